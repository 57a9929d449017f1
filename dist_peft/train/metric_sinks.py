"""Where metrics of a step are written: ``metrics.jsonl`` and TensorBoard.

More of them, on request: ``train.trackers``.

A sink is a class with ``__init__(run_dir, first_step)``, ``write_step`` and ``close``, and a row in
``METRIC_SINKS``. It runs on rank 0 only and may raise ``OSError``, which the caller reports.

A resumed run drops the records of later steps that an interrupted attempt has left: the lines of
the file, and in TensorBoard by ``purge_step``. So each step is written once.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from dist_peft.store.writer import write_atomically
from dist_peft.train.step_metrics import (
    METRICS_FILE,
    SCORE_TITLES,
    StepMetrics,
    format_line,
    read_metrics,
)

__all__ = ["METRIC_SINKS", "JsonLinesSink", "MetricSink", "TensorBoardSink", "list_scalars"]


_SHARES = (
    *("sampling_eps", "sampling_replaced"),
    *("domain_loss", "domain_accuracy", "reversal_strength"),
)
"""Fields of ``StepMetrics`` that some methods have."""


class MetricSink(Protocol):
    """Receives the metrics of each optimizer step."""

    def write_step(self, record: StepMetrics) -> None:
        """Write one step, in order of steps."""
        ...

    def close(self) -> None:
        """Flush and release files."""
        ...


class JsonLinesSink:
    """``metrics.jsonl``: a line a step, in the file when ``write_step`` returns."""

    def __init__(self, run_dir: Path, first_step: int) -> None:
        self.path = run_dir / METRICS_FILE
        self._drop_steps_after(first_step)
        self._file = self.path.open("a", encoding="utf-8")

    def _drop_steps_after(self, step: int) -> None:
        """Rewrite the file without later steps, torn or repeated lines, if it has any."""
        if not self.path.exists():
            return
        kept = "".join(format_line(r) for r in read_metrics(self.path) if r.step <= step)
        if kept != self.path.read_text(encoding="utf-8", errors="replace"):
            write_atomically(self.path, kept)

    def write_step(self, record: StepMetrics) -> None:
        """Append a line and flush it."""
        self._file.write(format_line(record))
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoardSink:
    """``tensorboard/``: a scalar a metric."""

    def __init__(self, run_dir: Path, first_step: int) -> None:
        # imported here: it takes seconds, and only rank 0 writes
        from torch.utils.tensorboard import SummaryWriter

        directory = str(run_dir / "tensorboard")
        self._board = SummaryWriter(directory, purge_step=first_step + 1, flush_secs=30)

    def write_step(self, record: StepMetrics) -> None:
        """Add the scalars of a step; those before training under the step before."""
        for name, value, step in list_scalars(record):
            self._board.add_scalar(name, value, step)
        for after, when in (("_before", record.step - 1), ("", record.step)):
            for number, sample in enumerate(getattr(record, f"sample_texts{after}") or (), 1):
                text = f"**{sample.get('prompt')}** {sample.get('text')}"
                self._board.add_text(f"samples/{number}", text, when)

    def close(self) -> None:
        """Write the last events."""
        self._board.close()


def list_scalars(record: StepMetrics) -> list[tuple[str, float, int]]:
    """Return name, value and step of the numbers of a record, under the names of TensorBoard.

    Losses and scores before training belong to the step before.
    """
    step = record.step
    scalars: list[tuple[str, float, int]] = [
        ("train/loss", record.loss, step),
        ("train/lr", record.lr, step),
        ("train/grad_norm", record.grad_norm, step),
        ("speed/tokens_per_s", record.tokens_per_s, step),
        ("memory/peak_GiB", record.mem_peak / 2**30, step),
        ("communication/gathered_MiB", record.bytes_gathered / 2**20, step),
    ]
    if record.mem_reserved is not None:
        scalars.append(("memory/reserved_GiB", record.mem_reserved / 2**30, step))
    if record.straggler_share is not None:
        scalars.append(("speed/straggler_share", record.straggler_share, step))
    for name in ("rank_rate_min", "rank_rate_median", "rank_rate_max"):
        if (found := getattr(record, name)) is not None:
            scalars.append((f"speed/{name}", found, step))
    for name in ("nonfinite_steps", "spike", *_SHARES):
        if (found := getattr(record, name)) is not None:
            scalars.append((f"train/{name}", found, step))
    for after, when in (("_before", step - 1), ("", step)):
        for name in ("loss", *SCORE_TITLES):
            value = getattr(record, f"eval_{name}{after}")
            if value is not None:
                scalars.append((f"eval/{name}", value, when))
            prefix = "" if name == "loss" else f"{name}_"
            by_task = getattr(record, f"eval_{prefix}by_task{after}")
            scalars += [(f"eval/{name}/{task}", own, when) for task, own in (by_task or {}).items()]
    return scalars


METRIC_SINKS: tuple[Callable[[Path, int], MetricSink], ...] = (JsonLinesSink, TensorBoardSink)
"""Every run writes to each of them; those of ``save.track`` come after."""
