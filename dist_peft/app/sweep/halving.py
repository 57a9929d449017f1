"""Successive halving: points whose held-out loss is high stop early.

After each ``every`` steps (a rung) the best ``keep`` of the points that train continue, and the
others end with the adapter that they have (Jamieson and Talwalkar 2016). A choice is made when all
points have come to the rung, so that it does not depend on where a killed sweep has resumed them.
"""

import math
from collections.abc import Mapping
from pathlib import Path

from dist_peft.core.config.run import HalvingConfig
from dist_peft.core.errors import UserError
from dist_peft.core.world import World
from dist_peft.train.step_metrics import METRICS_FILE, read_metrics

__all__ = ["choose_stopped", "read_held_out_losses"]


def choose_stopped(halving: HalvingConfig, losses: Mapping[int, float]) -> list[int]:
    """Return the numbers of the points that stop, in their order.

    Args:
        losses: held-out loss by number; of equal ones the lower number continues, and one
            that is no number is the worst.
    """
    kept = max(1, math.ceil(halving.keep * len(losses) - 1e-9))
    ranked = sorted(losses, key=lambda k: (math.isnan(losses[k]), losses[k], k))
    return sorted(ranked[kept:])


def read_held_out_losses(run_dirs: Mapping[int, Path], step: int, world: World) -> dict[int, float]:
    """Return the held-out loss of each run after ``step``, the same on every rank. Collective.

    Raises:
        UserError: on every rank: metrics are damaged, or have no such evaluation.
    """
    losses = [0.0] * len(run_dirs)
    with world.raise_together("read held-out losses"):
        if world.is_first:
            losses = [_read_loss(run_dir, step) for run_dir in run_dirs.values()]
    summed = world.sum_over_ranks(*losses)
    return dict(zip(run_dirs, summed, strict=True))


def _read_loss(run_dir: Path, step: int) -> float:
    for record in read_metrics(run_dir / METRICS_FILE):
        if record.step == step and record.eval_loss is not None:
            return record.eval_loss
    raise UserError(
        f"sweep.halving: {run_dir / METRICS_FILE} has no held-out loss of step {step}; start over "
        "with resume: never"
    )
