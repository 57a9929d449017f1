"""``dist-peft inspect PATH``: describe a base, adapter, run or checkpoint."""

import argparse
from collections import Counter
from math import prod
from pathlib import Path

from dist_peft.adapters.directory import find_config_file
from dist_peft.adapters.full.format import contains_trained_weights
from dist_peft.app.config_arguments import parse_path
from dist_peft.app.inspect_adapter import (
    describe_adapter,
    describe_trained_weights,
    load_json_object,
)
from dist_peft.app.tasks import list_task_runs
from dist_peft.core.errors import UserError
from dist_peft.core.input_paths import refuse_special_file, refuse_special_files
from dist_peft.core.world import World
from dist_peft.model.prequantized.base import open_prequantized
from dist_peft.store.index import SafetensorsIndex
from dist_peft.train.checkpoint import CheckpointManager
from dist_peft.train.run_state import read_run_state
from dist_peft.train.step_metrics import METRICS_FILE, read_metrics

__all__ = ["add_arguments", "describe_path", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``dist-peft inspect``."""
    parser.add_argument("path", type=parse_path)


def run(args: argparse.Namespace, world: World) -> int:
    if world.is_first:
        print("\n".join(describe_path(args.path)))
    return 0


def describe_path(path: Path) -> list[str]:
    """Return lines that describe the kind and the contents of ``path``.

    Raises:
        UserError: ``path`` is unreadable or of no known kind.
    """
    try:
        path.stat()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    refuse_special_file(path)
    refuse_special_files(path)
    if (path / "config.yaml").is_file():
        return _describe_run(path)
    if (path / "run.json").is_file():
        return _describe_checkpoint(path)
    if contains_trained_weights(path):
        return describe_trained_weights(path)
    if find_config_file(path).is_file():
        return describe_adapter(path)
    if path.suffix == ".safetensors" or (path / "config.json").is_file():
        return _describe_base(path)
    raise UserError(
        f"{path} is no base (config.json), adapter (adapter_config.json), run (config.yaml), "
        "checkpoint (run.json) or safetensors file"
    )


def _describe_base(path: Path) -> list[str]:
    index = SafetensorsIndex.open(path)
    infos = index.tensors.values()
    numbers = sum(prod(i.shape) for i in infos)
    types = Counter(str(i.dtype).removeprefix("torch.") for i in infos)
    unit = "parameters"
    lines = [f"base model {path}" if path.is_dir() else f"safetensors file {path}"]
    if (path / "config.json").is_file():
        config = load_json_object(path / "config.json")
        kinds = ", ".join(config.get("architectures") or [])
        lines.append(f"  type         {config.get('model_type')} {kinds}")
        if "quantization_config" in config:
            lines.append(f"  quantized    {_describe_quantization(path, index)}")
            unit = "numbers"  # packed: the count of stored values is not that of parameters
    files = len({i.file for i in infos})
    size = sum(i.stop - i.start for i in infos)
    lines += [
        f"  {unit:<12} {numbers:,} in {len(index.tensors)} tensors",
        f"  files        {files}, {size / 2**20:,.1f} MiB, "
        + ", ".join(f"{n} x {t}" for t, n in types.most_common()),
        f"  fingerprint  {index.compute_fingerprint()}",
    ]
    return lines


def _describe_quantization(path: Path, index: SafetensorsIndex) -> str:
    try:
        return str(open_prequantized(path, index))
    except UserError as error:
        return f"no base to train on: {error}"


def _describe_checkpoint(path: Path) -> list[str]:
    position = CheckpointManager.read_position(path)
    lines = [f"checkpoint {path}"]
    return lines + [f"  {key:<12} {value}" for key, value in vars(position).items()]


def _describe_run(path: Path) -> list[str]:
    lines = [f"run {path}"]
    state = read_run_state(path)
    if state is not None:
        reason = f": {state.reason}" if state.reason else ""
        lines.append(f"  state        {state.state} at step {state.step}, {state.time}{reason}")
    steps = read_metrics(path / METRICS_FILE)
    if steps:
        lines.append(f"  steps        {steps[-1].step}, last loss {steps[-1].loss:.4f}")
    for found in sorted((path / "checkpoints").glob("step-*")):
        lines += ["  " + line for line in _describe_checkpoint(found)]
    adapter = path / "adapter"
    if adapter.is_dir():
        about = describe_trained_weights if contains_trained_weights(adapter) else describe_adapter
        lines += ["  " + line for line in about(adapter)]
    for name, run in list_task_runs(path).items():
        lines.append(f"  task {name}")
        lines += ["    " + line for line in _describe_run(run)]
    return lines
