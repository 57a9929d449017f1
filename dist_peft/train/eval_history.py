"""The held-out losses of a run: the best, when to stop, and one that a signal has left out."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from dist_peft.core.world import World
from dist_peft.train.evaluate import EvalResult, add_evaluation
from dist_peft.train.metrics import MetricsWriter
from dist_peft.train.step_metrics import METRICS_FILE, StepMetrics, read_metrics

__all__ = ["EvaluationHistory", "open_metrics"]


@dataclass
class EvaluationHistory:
    """Held-out losses in the order of their steps.

    Attributes:
        patience: evaluations in a row without a lower loss after which to stop; 0: never.
        best_loss: least loss so far, in nats; infinite before the first evaluation.
        num_since_best: evaluations since then.
    """

    patience: int = 0
    best_loss: float = math.inf
    num_since_best: int = 0

    @classmethod
    def from_metrics(cls, records: Iterable[StepMetrics], patience: int) -> Self:
        """Return the history of the steps in ``records``, in their order."""
        history = cls(patience)
        for record in records:
            if record.eval_loss is not None:
                history.add_loss(record.eval_loss)
        return history

    def add_loss(self, loss: float) -> bool:
        """Add the loss of an evaluation; return whether it is lower than all before."""
        is_best = loss < self.best_loss
        if is_best:
            self.best_loss = loss
        self.num_since_best = 0 if is_best else self.num_since_best + 1
        return is_best

    @property
    def should_stop(self) -> bool:
        return 0 < self.patience <= self.num_since_best

    @classmethod
    def read_from_run(cls, run_dir: Path, patience: int, world: World) -> Self:
        """Return the history of the steps done so far in ``run_dir``. Collective.

        The metrics are read by the first rank, which writes them.

        Raises:
            UserError: on every rank: they are damaged.
        """
        history = cls(patience)
        with world.raise_together("read the evaluations so far"):
            if world.is_first:
                history = cls.from_metrics(read_metrics(run_dir / METRICS_FILE), patience)
        nothing = -math.inf
        mine = (-history.best_loss, float(history.num_since_best))
        loss, count = world.max_over_ranks(*(mine if world.is_first else (nothing, nothing)))
        history.best_loss, history.num_since_best = -loss, int(count)
        return history


def open_metrics(
    run_dir: Path,
    first_step: int,
    world: World,
    rank: int,
    evaluate: Callable[[], EvalResult | None] | None = None,
) -> MetricsWriter:
    """Open the metrics of a run that has done ``first_step`` steps. Collective.

    Args:
        rank: of this process; the first writes.
        evaluate: where an evaluation is due after the last of them; called if a signal has stopped
            it, and its result is added to the record of that step.

    Raises:
        UserError: on every rank: the metrics are damaged or cannot be written.
    """
    record = None if evaluate is None else _find_unevaluated_record(run_dir, first_step, world)
    if record is not None and evaluate is not None:
        record = add_evaluation(record, evaluate())
    known = first_step if record is None else first_step - 1
    with world.raise_together("open metrics"):
        metrics = MetricsWriter(run_dir, rank, known)
        if record is not None:
            metrics.write_step(record)
    return metrics


def _find_unevaluated_record(run_dir: Path, step: int, world: World) -> StepMetrics | None:
    """Return the record of ``step`` if it has no held-out loss; on each rank, read by the first.

    On the other ranks, which write no metrics, it has its step alone.
    """
    found: StepMetrics | None = None
    with world.raise_together("read the last evaluation"):
        if world.is_first:
            same = (r for r in read_metrics(run_dir / METRICS_FILE) if r.step == step)
            found = next((record for record in same if record.eval_loss is None), None)
    if not world.any_rank(found is not None):
        return None
    return found or StepMetrics(step, 0.0, 0.0, 0.0, 0, 0.0, 0, 0)
