"""Runs with ``train.exact``, and a digest of everything that must not depend on their ranks."""

import hashlib
import json
from pathlib import Path
from typing import Any

from dist_peft.core.world import World
from dist_peft.train.checkpoint import CheckpointManager
from dist_peft.train.checkpoint_verify import read_metadata
from dist_peft.train.step_metrics import read_metrics

RECORDED = ("loss", "grad_norm", "lr", "eval_loss", "eval_loss_before", "tokens")


def digest_state(run_dir: Path) -> str:
    """SHA-256 of every tensor of the last checkpoint: parameters and moments."""
    checkpoints = CheckpointManager(run_dir / "checkpoints", 1, World())
    path = checkpoints.find_checkpoint("last")
    names = sorted(read_metadata(path).state_dict_metadata)
    digest = hashlib.sha256()
    for name, tensor in sorted(checkpoints.read_whole_tensors(path, names).items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def digest_losses(run_dir: Path) -> str:
    """SHA-256 of the recorded losses, norms, rates and evaluations, by step."""
    records = read_metrics(run_dir / "metrics.jsonl")
    lines: list[dict[str, Any]] = [
        {"step": record.step} | {key: getattr(record, key) for key in RECORDED}
        for record in records
    ]
    return hashlib.sha256(json.dumps(lines).encode()).hexdigest()
