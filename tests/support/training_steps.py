"""Optimizer steps alone: without metrics, evaluation and checkpoints."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dist_peft.data.loader import Loader
from dist_peft.train.loop import TrainingStep


@dataclass(frozen=True)
class StepResult:
    """One optimizer step; ``step`` counts it."""

    step: int
    loss: float
    grad_norm: float
    tokens: int


def run_training_steps(
    part: TrainingStep,
    loader: Loader[Any],
    steps: range,
    lr_at: Callable[[int], float],
    max_grad_norm: float = 1.0,
) -> list[StepResult]:
    """Run ``steps`` as ``Trainer.run_training_loop`` does."""
    results = []
    for step in steps:
        batches, targets = loader.load_step(step)
        loss = part.accumulate_gradients(step, batches, targets)
        norm = part.update_parameters(step, loss, lr_at(step), max_grad_norm)
        results.append(StepResult(step + 1, loss, norm, targets))
    return results
