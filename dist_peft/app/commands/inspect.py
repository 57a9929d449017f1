"""``dist-peft inspect PATH``: describe a base, adapter, run or checkpoint."""

import argparse
from collections import Counter
from dataclasses import asdict
from math import prod
from pathlib import Path

from dist_peft.adapters.full.format import contains_trained_weights
from dist_peft.app.chain_check import check_path_chain, describe_chain
from dist_peft.app.config_arguments import parse_path
from dist_peft.app.inspect_adapter import (
    describe_adapter,
    describe_trained_weights,
    load_json_object,
    shorten_value,
)
from dist_peft.app.inspect_json import collect_facts, detect_path_kind
from dist_peft.app.json_output import print_document
from dist_peft.app.tasks import list_point_runs, list_task_runs
from dist_peft.core.errors import UserError
from dist_peft.core.world import World
from dist_peft.model.prequantized.base import open_prequantized
from dist_peft.store.index import SafetensorsIndex
from dist_peft.train.checkpoint import CheckpointManager
from dist_peft.train.run_state import read_run_state
from dist_peft.train.step_metrics import METRICS_FILE, read_metrics

__all__ = ["add_arguments", "describe_path", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``dist-peft inspect``."""
    parser.add_argument("path", type=parse_path, help="base, adapter, run or checkpoint")
    parser.add_argument("--json", action="store_true", help="print the facts as JSON")


def run(args: argparse.Namespace, world: World) -> int:
    """Print the description, or the facts as JSON; return 0.

    Raises:
        UserError: the path is unreadable or of no known kind.
        AuditError: it is of an exact run, and not as the run has written it.
    """
    chain = check_path_chain(args.path) if world.is_first else None
    if world.is_first and args.json:
        facts = collect_facts(args.path)
        facts |= {} if chain is None else {"chain": asdict(chain)}
        print_document(facts, indent=1)
    elif world.is_first:
        lines = describe_path(args.path)
        print(
            "\n".join(
                [*lines, *([] if chain is None else [f"  chain        {describe_chain(chain)}"])]
            )
        )
    return 0


def describe_path(path: Path) -> list[str]:
    """Return lines that describe the kind and the contents of ``path``.

    Raises:
        UserError: ``path`` is unreadable or of no known kind.
    """
    describe = {
        "run": _describe_run,
        "checkpoint": _describe_checkpoint,
        "trained weights": describe_trained_weights,
        "adapter": describe_adapter,
        "base": _describe_base,
    }
    return describe[detect_path_kind(path)](path)


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
    facts = vars(position).items()
    return lines + [f"  {key:<12} {shorten_value(key, value)}" for key, value in facts]


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
    for run in list_point_runs(path):
        lines.append(f"  {run.name}")
        lines += ["    " + line for line in _describe_run(run)]
    return lines
