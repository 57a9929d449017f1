"""Spikes of the training loss: steps far above the steps before, by a robust z-score.

With the losses ``x`` of the last ``WINDOW`` steps before step ``t``::

    center = median(x)
    scale  = max(1.4826 * median(|x - center|), 0.01 * |center|)
    score  = (x_t - center) / scale

Median and median absolute deviation (MAD) stay where they are while up to half of the window are
outliers, where mean and standard deviation would follow them; 1.4826 makes the MAD of a normal
distribution its standard deviation (Hampel 1974, "The influence curve and its role in robust
estimation"). The lower bound of the scale keeps tiny deviations of an almost constant loss from
being spikes.
"""

import logging
import math
import statistics
from collections import deque
from collections.abc import Iterable
from pathlib import Path

from dist_peft.core.log import ONCE
from dist_peft.core.world import World
from dist_peft.train.step_metrics import METRICS_FILE, read_metrics

__all__ = ["SpikeDetector"]

log = logging.getLogger("dist_peft")

WINDOW = 64
"""Steps that a loss is compared with."""

FEWEST = 16
"""Steps without a score at the beginning."""

_MAD_TO_SIGMA = 1.4826
_LEAST_SCALE = 0.01


class SpikeDetector:
    """Scores the losses of a run, in the order of its steps.

    Args:
        threshold: least score of a spike; 0: none is.
        losses: of the steps so far; the last ``WINDOW`` count. Losses that are not finite do not.
    """

    def __init__(self, threshold: float, losses: Iterable[float] = ()) -> None:
        self.threshold = threshold
        self._losses = deque((x for x in losses if math.isfinite(x)), maxlen=WINDOW)

    @classmethod
    def read_from_run(cls, run_dir: Path, threshold: float, world: World) -> "SpikeDetector":
        """Return a detector that knows the steps done so far in ``run_dir``. Collective.

        The first rank alone reads the metrics, which it writes; the scores of others are not used.

        Raises:
            UserError: on every rank: they are damaged.
        """
        losses: list[float] = []

        def read_losses() -> None:
            losses.extend(record.loss for record in read_metrics(run_dir / METRICS_FILE))

        world.run_on_first("read the losses so far", read_losses)
        return cls(threshold, losses)

    @property
    def median(self) -> float:
        """Median of the losses so far, in nats; NaN before the first."""
        return statistics.median(self._losses) if self._losses else math.nan

    def add_loss(self, loss: float) -> float | None:
        """Add the loss of a step; return its score if it is a spike."""
        score = self._compute_score(loss)
        if math.isfinite(loss):
            self._losses.append(loss)
        return score if score is not None and score >= self.threshold > 0 else None

    def log_loss(self, step: int, loss: float) -> float | None:
        """Add the loss of step ``step`` and warn if it is a spike; return its score then."""
        median, score = self.median, self.add_loss(loss)
        if score is not None:
            log.warning(
                "step %d: loss %.4f is a spike: %.1f robust standard deviations above %.4f, the "
                "median of the steps before (train.spike_score)",
                step,
                loss,
                score,
                median,
                extra=ONCE,
            )
        return score

    def _compute_score(self, loss: float) -> float | None:
        if len(self._losses) < FEWEST or not math.isfinite(loss):
            return None
        center = self.median
        spread = statistics.median(abs(x - center) for x in self._losses)
        scale = max(_MAD_TO_SIGMA * spread, _LEAST_SCALE * abs(center), 1e-12)
        return (loss - center) / scale
