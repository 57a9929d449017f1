"""Held-out loss: mean over all targets of the evaluation sequences, in nats; class scores."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dist_peft.core.progress_beat import SETUP_PATIENCE, enter_phase, mark_progress
from dist_peft.core.world import World
from dist_peft.data.loader import Batch, Loader, find_batch_tasks
from dist_peft.engine import Engine
from dist_peft.quant.fixed_point import SplitSum
from dist_peft.train.classification_metrics import ClassScores
from dist_peft.train.objective import Objective
from dist_peft.train.step_metrics import SCORE_TITLES, StepMetrics

__all__ = [
    "EvalResult",
    "HeldOutSums",
    "add_evaluation",
    "enter_evaluation",
    "evaluate_model",
    "inference_mode",
]

BatchT = TypeVar("BatchT", bound=Batch)


@contextmanager
def inference_mode(model: nn.Module) -> Iterator[None]:
    """Disable gradients, and dropout in adapters."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


@dataclass(frozen=True)
class EvalResult:
    """Mean loss over all targets and over those of each named task, and the objective's scores."""

    loss: float
    by_task: dict[str, float]
    scores: ClassScores | None = None
    scores_by_task: dict[str, ClassScores] = field(default_factory=dict)

    def __str__(self) -> str:
        tasks = ", ".join(f"{name} {self._task_suffix(name)}" for name in self.by_task)
        scores = "" if self.scores is None else f", {self.scores}"
        return f"{self.loss:.4f}{scores}{f' ({tasks})' if tasks else ''}"

    def _task_suffix(self, name: str) -> str:
        scores = self.scores_by_task.get(name)
        return f"{self.by_task[name]:.4f}{'' if scores is None else f', {scores}'}"

    def to_metric_fields(self, after: str = "") -> dict[str, Any]:
        """Return the known values under the names of the fields of ``StepMetrics``.

        Args:
            after: suffix of each name, such as ``_before``.
        """
        found: dict[str, Any] = {"eval_loss": self.loss}
        if self.by_task:
            found["eval_by_task"] = self.by_task
        for name in () if self.scores is None else SCORE_TITLES:
            if (score := getattr(self.scores, name)) is not None:
                found[f"eval_{name}"] = score
            own = {task: getattr(s, name) for task, s in self.scores_by_task.items()}
            if own := {task: value for task, value in own.items() if value is not None}:
                found[f"eval_{name}_by_task"] = own
        return {f"{name}{after}": value for name, value in found.items()}


def evaluate_model(
    model: nn.Module,
    engine: Engine,
    objective: Objective[BatchT],
    loader: Loader[BatchT],
    world: World,
) -> EvalResult:
    """Evaluate the held-out loss; each rank computes the same number of batches of its share.

    Raises:
        StopRequested: on every rank, between two batches, after a signal to any.
    """
    sums = HeldOutSums(objective, loader)
    with enter_evaluation(model):
        for batch in loader.load_all_sequential():
            mark_progress()
            world.raise_if_stop_requested()
            sums.add_batch(batch, objective.compute_row_statistics(model, batch, engine.device))
    return sums.compute_result(world)


@contextmanager
def enter_evaluation(model: nn.Module) -> Iterator[None]:
    """The context of an evaluation's forward passes."""
    with inference_mode(model), enter_phase("evaluation", SETUP_PATIENCE):
        yield


class HeldOutSums:
    """Statistics of the sequences of a data set, summed by task.

    Args:
        objective: computes the statistics.
        loader: of the data set.
    """

    def __init__(self, objective: Objective[Any], loader: Loader[Any]) -> None:
        self._objective, self._rows = objective, loader.rows
        self._tasks = len(self._rows.task_names)
        self._summed: SplitSum | None = None  # of tasks x statistics

    def add_batch(self, batch: Batch, statistics: Tensor) -> None:
        """Add ``compute_row_statistics`` of a batch, ``[B, 2 + K]``."""
        if self._summed is None:
            self._summed = SplitSum(self._tasks * statistics.shape[1])
        self._summed.add_rows(statistics, torch.tensor(find_batch_tasks(self._rows, batch)))

    def compute_result(self, world: World) -> EvalResult:
        """Sum over ranks and return the means; a collective."""
        names, objective = self._rows.task_names, self._objective
        assert self._summed is not None, "a data set has at least one sequence"
        world.all_reduce_sum(self._summed.integers)
        found = self._summed.to_floats()
        sums = torch.tensor(found, dtype=torch.float64).view(self._tasks, -1)
        total = sums.sum(0)
        by_task = dict(zip(names, sums, strict=True)) if names != ("",) else {}
        scores = {name: objective.compute_scores(own[2:], name) for name, own in by_task.items()}
        return EvalResult(
            _divide_by_targets(total),
            {name: _divide_by_targets(own) for name, own in by_task.items()},
            objective.compute_scores(total[2:]),
            {name: own for name, own in scores.items() if own is not None},
        )


def _divide_by_targets(sums: Tensor) -> float:
    return float(sums[0] / sums[1])


def add_evaluation(record: StepMetrics, found: EvalResult | None, after: str = "") -> StepMetrics:
    """Return ``record`` with the known values of ``found`` in its fields that end in ``after``."""
    return record if found is None else replace(record, **found.to_metric_fields(after))
