"""Progress display of a training run: a bar on a terminal, plain lines elsewhere.

The bar is redrawn every step. Lines appear every ``every`` steps, with the first, the last and each
evaluation; with a bar they go to ``log.txt`` alone, evaluations excepted::

    step 120/1000  loss 1.8342  lr 1.96e-04  grad 0.41  5403 tok/s  7.57 GiB  eta 0:43:12
"""

import logging
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from tqdm import tqdm

from dist_peft.core.closing import ClosedAtExit
from dist_peft.core.log import FILE_ONLY, is_quiet
from dist_peft.train.metrics import format_byte_count
from dist_peft.train.step_metrics import StepMetrics

__all__ = ["ProgressDisplay"]

log = logging.getLogger("dist_peft")


class ProgressDisplay(ClosedAtExit):
    """Progress of a training run on rank 0; a no-op on other ranks. A context manager."""

    def __init__(
        self,
        total: int,
        rank: int,
        *,
        first_step: int = 0,
        every: int = 1,
        unit: str = "tok",
        clock: Callable[[], float] = time.monotonic,
        name: str = "",
    ) -> None:
        """
        Args:
            total: steps of the whole run.
            rank: this process.
            first_step: steps done by earlier attempts.
            every: steps between lines.
            unit: the targets of the loss: tokens, or the rows of a classifier.
            clock: returns seconds.
            name: shown before each line; with one there is no bar, since there are several runs.
        """
        self.total = total
        self.first_step = first_step
        self.every, self.unit = every, unit
        self.active = rank == 0
        self._clock = clock
        self._start = clock()
        self._bar: Any = None
        self._name = name and f"{name}, "
        if self.active and not name and sys.stderr.isatty() and not is_quiet():
            self._bar = tqdm(
                total=total, initial=first_step, unit="step", file=sys.stderr, dynamic_ncols=True
            )

    def show_step(self, record: StepMetrics) -> None:
        """Show a finished step."""
        if not self.active:
            return
        if self._bar is not None:
            self._bar.set_postfix_str(
                f"loss {record.loss:.4f}, lr {record.lr:.2e}, {self._format_speed(record)}",
                refresh=False,
            )
            self._bar.update(record.step - self._bar.n)
        evaluated = record.eval_loss is not None
        ends = (self.first_step + 1, self.total)
        if record.step % self.every == 0 or record.step in ends or evaluated:
            hidden = self._bar is not None and not evaluated
            log.info(self._format_progress_line(record), extra=FILE_ONLY if hidden else None)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _format_progress_line(self, record: StepMetrics) -> str:
        parts = [
            f"{self._name}step {record.step}/{self.total}",
            f"loss {record.loss:.4f}",
            f"lr {record.lr:.2e}",
            f"grad {record.grad_norm:.3g}",
            self._format_speed(record),
            format_byte_count(record.mem_peak),
            f"eta {self._estimate_remaining(record.step)}",
        ]
        if record.eval_loss is not None:
            parts.insert(2, f"eval loss {record.eval_loss:.4f}")
        return "  ".join(parts)

    def _format_speed(self, record: StepMetrics) -> str:
        return f"{record.tokens_per_s:.0f} {self.unit}/s"

    def _estimate_remaining(self, step: int) -> timedelta:
        """Estimate from the mean of this attempt's steps, evaluations and checkpoints included."""
        done = step - self.first_step
        seconds = (self._clock() - self._start) / max(done, 1) * (self.total - step)
        return timedelta(seconds=round(seconds))
