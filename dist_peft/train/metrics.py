"""Metrics of a run: written by rank 0, a record an optimizer step (``train.step_metrics``)."""

import resource
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import torch

from dist_peft.core.closing import ClosedAtExit
from dist_peft.core.errors import UserError
from dist_peft.train.metric_sinks import METRIC_SINKS, MetricSink
from dist_peft.train.step_metrics import METRICS_FILE, StepMetrics

__all__ = ["MakeSink", "MetricsWriter", "format_byte_count", "read_peak_memory_bytes"]

MakeSink = Callable[[Path, int], MetricSink]
"""Run directory and number of steps done -> sink."""


class MetricsWriter(ClosedAtExit):
    """Write each step to all sinks, from rank 0; a context manager.

    On other ranks every method does nothing. A sink is a class of ``train.metric_sinks``.
    """

    def __init__(
        self, run_dir: Path, rank: int, first_step: int = 0, trackers: Sequence[MakeSink] = ()
    ) -> None:
        """Open the sinks.

        Args:
            run_dir: made if it does not exist.
            rank: of this process.
            first_step: steps already done; records of later steps are dropped.
            trackers: more sinks (``train.trackers``).

        Raises:
            UserError: the files cannot be written.
        """
        self.path = run_dir / METRICS_FILE
        self._sinks: list[MetricSink] = []
        if rank != 0:
            return
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            for make_sink in (*METRIC_SINKS, *trackers):
                self._sinks.append(make_sink(run_dir, first_step))
        except OSError as error:
            raise _write_error(self.path, error) from None

    def write_step(self, record: StepMetrics) -> None:
        """Append a step; it is flushed to the file before this returns.

        Raises:
            UserError: the disk is full or gone.
        """
        try:
            for sink in self._sinks:
                sink.write_step(record)
        except OSError as error:
            with suppress(UserError):  # the buffered rest fails once more
                self.close()
            raise _write_error(self.path, error) from None

    def close(self) -> None:
        """Flush and close every sink.

        Raises:
            UserError: TensorBoard's last events could not be written.
        """
        sinks, self._sinks = self._sinks, []
        try:
            for sink in sinks:
                sink.close()
        except OSError as error:
            raise _write_error(self.path, error) from None


def read_peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory of this process so far, in bytes.

    On CUDA the memory of tensors on ``device`` (without the allocator's cache and the context),
    else the peak resident set size, which includes Python and its libraries.
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


def format_byte_count(count: float) -> str:
    """Format ``1536`` as ``1.50 KiB``: three digits, largest unit with a value of 1 or more."""
    units = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
    value, unit = float(count), 0
    while value >= 1000 and unit < len(units) - 1:
        value, unit = value / 1024, unit + 1
    if unit == 0:
        return f"{value:.0f} B"
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {units[unit]}"


def _write_error(path: Path, error: OSError) -> UserError:
    return UserError(
        f"cannot write {error.filename or path}: {error.strerror}; free space or give save.dir "
        "another directory, then resume"
    )
