"""The best held-out loss of a run so far, and when to stop for want of a better one."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from dist_peft.core.world import World
from dist_peft.train.step_metrics import METRICS_FILE, StepMetrics, read_metrics

__all__ = ["EvaluationHistory"]


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
