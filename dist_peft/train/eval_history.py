"""The evaluations of a run: the best, when to stop, and one that a signal has left out."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dist_peft.core.world import World
from dist_peft.train.evaluate import EvalResult, add_evaluation
from dist_peft.train.metrics import MakeSink, MetricsWriter
from dist_peft.train.step_metrics import METRICS_FILE, StepMetrics, read_metrics

__all__ = ["EvaluationHistory", "open_metrics"]


@dataclass
class EvaluationHistory:
    """Held-out values of one metric in the order of their steps.

    Attributes:
        patience: evaluations in a row without a better value after which to stop; 0: never.
        metric: ``loss``, of which less is better, or a score of classes.
        best_value: best value so far; None before the first evaluation.
        num_since_best: evaluations since then.
    """

    patience: int = 0
    metric: str = "loss"
    best_value: float | None = None
    num_since_best: int = 0

    @property
    def best(self) -> tuple[str, float] | None:
        """Metric and best value; None before the first evaluation."""
        return None if self.best_value is None else (self.metric, self.best_value)

    def add_value(self, value: float) -> bool:
        """Add the value of an evaluation; return whether it is better than all before."""
        sign = self._sign
        # a value that is not a number is never better
        is_best = sign * value > (-math.inf if self.best_value is None else sign * self.best_value)
        if is_best:
            self.best_value = value
        self.num_since_best = 0 if is_best else self.num_since_best + 1
        return is_best

    def add_evaluation(self, found: EvalResult) -> bool:
        """Add an evaluation; return whether it is better than all before."""
        return self.add_value(found.to_metric_fields()[f"eval_{self.metric}"])

    @property
    def should_stop(self) -> bool:
        return 0 < self.patience <= self.num_since_best

    def add_records(self, records: Iterable[StepMetrics]) -> None:
        """Add the evaluations among ``records``, in their order."""
        for record in records:
            if (value := getattr(record, f"eval_{self.metric}")) is not None:
                self.add_value(value)

    def read_from_run(self, run_dir: Path, world: World) -> None:
        """Add the evaluations of the steps done so far in ``run_dir``. Collective.

        The metrics are read by the first rank, which writes them.

        Raises:
            UserError: on every rank: they are damaged.
        """
        with world.raise_together("read the evaluations so far"):
            if world.is_first:
                self.add_records(read_metrics(run_dir / METRICS_FILE))
        nothing, sign = -math.inf, self._sign
        best = nothing if self.best_value is None else sign * self.best_value
        mine = (best, float(self.num_since_best)) if world.is_first else (nothing, nothing)
        best, count = world.max_over_ranks(*mine)
        self.best_value = None if best == nothing else sign * best
        self.num_since_best = int(count)

    @property
    def _sign(self) -> int:
        return -1 if self.metric == "loss" else 1


def open_metrics(
    run_dir: Path,
    first_step: int,
    world: World,
    rank: int,
    evaluate: Callable[[], EvalResult | None] | None = None,
    trackers: Sequence[MakeSink] = (),
) -> MetricsWriter:
    """Open the metrics of a run that has done ``first_step`` steps. Collective.

    Args:
        rank: of this process; the first writes.
        evaluate: where an evaluation is due after the last of them; called if a signal has stopped
            it, and its result is added to the record of that step.
        trackers: more sinks.

    Raises:
        UserError: on every rank: the metrics are damaged or cannot be written.
    """
    record = None if evaluate is None else _find_unevaluated_record(run_dir, first_step, world)
    if record is not None and evaluate is not None:
        record = add_evaluation(record, evaluate())
    known = first_step if record is None else first_step - 1
    with world.raise_together("open metrics"):
        metrics = MetricsWriter(run_dir, rank, known, trackers)
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
