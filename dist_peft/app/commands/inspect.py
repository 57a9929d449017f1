"""``dist-peft inspect PATH``: describe a base, adapter, run or checkpoint."""

import argparse
from collections import Counter
from math import prod
from pathlib import Path

from dist_peft.adapters.directory import config_file
from dist_peft.adapters.full.format import holds_weights
from dist_peft.app.inspect_adapter import describe_adapter, describe_weights, read_json
from dist_peft.app.tasks import task_runs
from dist_peft.core.errors import UserError
from dist_peft.core.world import World
from dist_peft.model.prequantized.base import open_prequantized
from dist_peft.store.index import SafetensorsIndex
from dist_peft.train.checkpoint import Checkpoints
from dist_peft.train.step_metrics import METRICS_FILE, read_metrics

__all__ = ["add_arguments", "describe", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``dist-peft inspect``."""
    parser.add_argument("path", type=Path)


def run(args: argparse.Namespace, world: World) -> int:
    if world.is_first:
        print("\n".join(describe(args.path)))
    return 0


def describe(path: Path) -> list[str]:
    """Return lines that describe the kind and the contents of ``path``.

    Raises:
        UserError: ``path`` is unreadable or of no known kind.
    """
    try:
        path.stat()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if (path / "config.yaml").is_file():
        return _run(path)
    if (path / "run.json").is_file():
        return _checkpoint(path)
    if holds_weights(path):
        return describe_weights(path)
    if config_file(path).is_file():
        return describe_adapter(path)
    if path.suffix == ".safetensors" or (path / "config.json").is_file():
        return _base(path)
    raise UserError(
        f"{path} is no base (config.json), adapter (adapter_config.json), run (config.yaml), "
        "checkpoint (run.json) or safetensors file"
    )


def _base(path: Path) -> list[str]:
    index = SafetensorsIndex.open(path)
    infos = index.tensors.values()
    numbers = sum(prod(i.shape) for i in infos)
    types = Counter(str(i.dtype).removeprefix("torch.") for i in infos)
    unit = "parameters"
    lines = [f"base model {path}" if path.is_dir() else f"safetensors file {path}"]
    if (path / "config.json").is_file():
        config = read_json(path / "config.json")
        kinds = ", ".join(config.get("architectures") or [])
        lines.append(f"  type         {config.get('model_type')} {kinds}")
        if "quantization_config" in config:
            lines.append(f"  quantized    {_quantization(path, index)}")
            unit = "numbers"  # packed: the count of stored values is not that of parameters
    files = len({i.file for i in infos})
    size = sum(i.stop - i.start for i in infos)
    lines += [
        f"  {unit:<12} {numbers:,} in {len(index.tensors)} tensors",
        f"  files        {files}, {size / 2**20:,.1f} MiB, "
        + ", ".join(f"{n} x {t}" for t, n in types.most_common()),
        f"  fingerprint  {index.fingerprint()}",
    ]
    return lines


def _quantization(path: Path, index: SafetensorsIndex) -> str:
    try:
        return str(open_prequantized(path, index))
    except UserError as error:
        return f"no base to train on: {error}"


def _checkpoint(path: Path) -> list[str]:
    position = Checkpoints.position(path)
    lines = [f"checkpoint {path}"]
    return lines + [f"  {key:<12} {value}" for key, value in vars(position).items()]


def _run(path: Path) -> list[str]:
    lines = [f"run {path}"]
    steps = read_metrics(path / METRICS_FILE)
    if steps:
        lines.append(f"  steps        {steps[-1].step}, last loss {steps[-1].loss:.4f}")
    for found in sorted((path / "checkpoints").glob("step-*")):
        lines += ["  " + line for line in _checkpoint(found)]
    adapter = path / "adapter"
    if adapter.is_dir():
        about = describe_weights if holds_weights(adapter) else describe_adapter
        lines += ["  " + line for line in about(adapter)]
    for name, run in task_runs(path).items():
        lines.append(f"  task {name}")
        lines += ["    " + line for line in _run(run)]
    return lines
