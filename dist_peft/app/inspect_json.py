"""The facts of ``dist-peft inspect`` as JSON: a base, adapter, run or checkpoint."""

from collections import Counter
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any, Literal

from dist_peft.adapters.adapter_format import find_format
from dist_peft.adapters.directory import (
    check_public_adapter,
    find_config_file,
    read_adapter_directory,
)
from dist_peft.adapters.full.format import contains_trained_weights
from dist_peft.app.inspect_adapter import load_json_object
from dist_peft.app.tasks import list_point_runs, list_task_runs
from dist_peft.core.errors import UserError
from dist_peft.core.input_paths import refuse_special_file, refuse_special_files
from dist_peft.store.index import SafetensorsIndex
from dist_peft.train.checkpoint import CheckpointManager
from dist_peft.train.run_state import read_run_state
from dist_peft.train.step_metrics import METRICS_FILE, read_metrics

__all__ = ["PathKind", "collect_facts", "detect_path_kind"]

PathKind = Literal["run", "checkpoint", "trained weights", "adapter", "base"]


def detect_path_kind(path: Path) -> PathKind:
    """Return the kind of thing that is in ``path``.

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
        return "run"
    if (path / "run.json").is_file():
        return "checkpoint"
    if contains_trained_weights(path):
        return "trained weights"
    if find_config_file(path).is_file():
        return "adapter"
    if path.suffix == ".safetensors" or (path / "config.json").is_file():
        return "base"
    raise UserError(
        f"{path} is no base (config.json), adapter (adapter_config.json), run (config.yaml), "
        "checkpoint (run.json) or safetensors file"
    )


def collect_facts(path: Path) -> dict[str, Any]:
    """Return the facts about ``path``: ``kind``, ``path``, and those of its kind.

    Raises:
        UserError: ``path`` is unreadable or of no known kind.
    """
    kind = detect_path_kind(path)
    collect = {
        "run": _collect_run,
        "checkpoint": _collect_checkpoint,
        "trained weights": _collect_trained_weights,
        "adapter": _collect_adapter,
        "base": _collect_base,
    }
    return {"kind": kind, "path": str(path), **collect[kind](path)}


def _collect_base(path: Path) -> dict[str, Any]:
    index = SafetensorsIndex.open(path)
    types = Counter(str(i.dtype).removeprefix("torch.") for i in index.tensors.values())
    found: dict[str, Any] = {"config": None}
    if (path / "config.json").is_file():
        found["config"] = load_json_object(path / "config.json")
    return found | {
        **_count_numbers(index),
        "dtypes": dict(types.most_common()),
        "fingerprint": index.compute_fingerprint(),
    }


def _count_numbers(index: SafetensorsIndex) -> dict[str, Any]:
    infos = index.tensors.values()
    return {
        "numbers": sum(prod(info.shape) for info in infos),
        "tensors": len(index.tensors),
        "bytes": sum(info.stop - info.start for info in infos),
    }


def _collect_adapter(path: Path) -> dict[str, Any]:
    config, own = load_json_object(find_config_file(path)), path / "dist_peft.json"
    known, obstacle = find_format(config), None
    try:
        check_public_adapter(read_adapter_directory(path))
    except UserError as error:
        obstacle = str(error)
    files = sorted(path.glob("*.safetensors"))  # a pickle is never opened
    return {
        "method": None if known is None else known.describe(config),
        "config": config,
        **(_count_numbers(SafetensorsIndex.open(files[0])) if files else {}),
        "not_read": obstacle,
        "dist_peft": load_json_object(own) if own.is_file() else None,
    }


def _collect_trained_weights(path: Path) -> dict[str, Any]:
    return {
        **_count_numbers(SafetensorsIndex.open(path)),
        "dist_peft": load_json_object(path / "dist_peft.json"),
    }


def _collect_checkpoint(path: Path) -> dict[str, Any]:
    return asdict(CheckpointManager.read_position(path))


def _collect_run(path: Path) -> dict[str, Any]:
    state, steps = read_run_state(path), read_metrics(path / METRICS_FILE)
    checkpoints = sorted((path / "checkpoints").glob("step-*"))
    return {
        "state": None if state is None else asdict(state),
        "steps": steps[-1].step if steps else 0,
        "last_loss": steps[-1].loss if steps else None,
        "checkpoints": [{"path": str(at), **_collect_checkpoint(at)} for at in checkpoints],
        "adapter": collect_facts(path / "adapter") if (path / "adapter").is_dir() else None,
        "tasks": {name: collect_facts(run) for name, run in list_task_runs(path).items()},
        "points": {run.name: collect_facts(run) for run in list_point_runs(path)},
    }
