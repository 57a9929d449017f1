"""``metrics.jsonl`` and TensorBoard: one record an optimizer step, written by rank 0.

A line of ``metrics.jsonl`` (keys without a value are left out, a number that is not finite is
``null``)::

    {"step": 12, "loss": 1.83, "lr": 0.0002, "grad_norm": 0.41, "tokens": 16210,
     "tokens_per_s": 5403.1, "mem_peak": 8123456789, "bytes_gathered": 123456, ...}

The file holds each step once. A run resumed at step k drops the lines of later steps that an
interrupted attempt has left, so does TensorBoard (``purge_step``).
"""

import json
import math
import resource
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

import torch

from dist_peft.core.errors import UserError
from dist_peft.store.writer import atomic_write

__all__ = [
    "METRICS_FILE",
    "Metrics",
    "StepMetrics",
    "format_bytes",
    "peak_memory_bytes",
    "read_metrics",
]

METRICS_FILE = "metrics.jsonl"

_BY_TASK = tuple(
    f"eval_{what}by_task{when}"
    for what in ("", "accuracy_", "macro_f1_")
    for when in ("", "_before")
)


@dataclass(frozen=True)
class StepMetrics:
    """What is known about one optimizer step.

    Attributes:
        step: steps done, this one included.
        loss: mean over the step's target tokens, in nats.
        lr: learning rate of the update.
        grad_norm: norm of the whole gradient before clipping.
        tokens: target tokens of the step, over all ranks.
        tokens_per_s: ``tokens`` over the step's wall time.
        mem_peak: peak memory so far in bytes, of the rank that uses most.
        bytes_gathered: bytes of all-gather output one rank received in the step.
        eval_loss: held-out loss after the step, where it was evaluated.
        eval_loss_before: held-out loss before the first step, on the line of that step.
        eval_by_task, eval_by_task_before: the same for each of several held-out sources, by name.
        eval_accuracy, eval_macro_f1, ...: of classes, see ``train.class_loss``; as the losses.
        epoch: passes over the training rows so far.
        samples: rows seen so far.
        seconds: wall time of the step.
    """

    step: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    tokens_per_s: float
    mem_peak: int
    bytes_gathered: int
    eval_loss: float | None = None
    eval_loss_before: float | None = None
    eval_by_task: dict[str, float] | None = None
    eval_by_task_before: dict[str, float] | None = None
    eval_accuracy: float | None = None
    eval_accuracy_before: float | None = None
    eval_accuracy_by_task: dict[str, float] | None = None
    eval_accuracy_by_task_before: dict[str, float] | None = None
    eval_macro_f1: float | None = None
    eval_macro_f1_before: float | None = None
    eval_macro_f1_by_task: dict[str, float] | None = None
    eval_macro_f1_by_task_before: dict[str, float] | None = None
    epoch: float | None = None
    samples: int | None = None
    seconds: float | None = None


class Metrics:
    """The writer; on ranks other than 0 every method does nothing. A context manager."""

    def __init__(self, run_dir: Path, rank: int, first_step: int = 0) -> None:
        """``first_step``: steps already done; records of later steps are dropped.

        Raises:
            UserError: the files cannot be written.
        """
        self.path = run_dir / METRICS_FILE
        self._file: TextIO | None = None
        self._board: Any = None
        if rank != 0:
            return
        # here because it takes seconds and only one rank writes
        from torch.utils.tensorboard import SummaryWriter

        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            self._forget_after(first_step)
            self._file = self.path.open("a", encoding="utf-8")
            self._board = SummaryWriter(
                str(run_dir / "tensorboard"), purge_step=first_step + 1, flush_secs=30
            )
        except OSError as error:
            raise _cannot_write(self.path, error) from None

    def write(self, record: StepMetrics) -> None:
        """Append a step; it is in the file when this returns.

        Raises:
            UserError: the disk is full or gone.
        """
        if self._file is None:
            return
        try:
            self._file.write(_to_line(record))
            self._file.flush()
            self._to_board(record)
        except OSError as error:
            with suppress(UserError):  # what is still buffered fails once more
                self.close()
            raise _cannot_write(self.path, error) from None

    def close(self) -> None:
        """
        Raises:
            UserError: TensorBoard's last events could not be written.
        """
        file, board, self._file, self._board = self._file, self._board, None, None
        try:
            for writer in (file, board):
                if writer is not None:
                    writer.close()
        except OSError as error:
            raise _cannot_write(self.path, error) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _forget_after(self, step: int) -> None:
        """Rewrite the file without later steps, torn or repeated lines, if it has any."""
        if not self.path.exists():
            return
        kept = "".join(_to_line(r) for r in read_metrics(self.path) if r.step <= step)
        if kept != self.path.read_text(encoding="utf-8", errors="replace"):
            atomic_write(self.path, kept)

    def _to_board(self, record: StepMetrics) -> None:
        board, step = self._board, record.step
        board.add_scalar("train/loss", record.loss, step)
        board.add_scalar("train/lr", record.lr, step)
        board.add_scalar("train/grad_norm", record.grad_norm, step)
        board.add_scalar("speed/tokens_per_s", record.tokens_per_s, step)
        board.add_scalar("memory/peak_GiB", record.mem_peak / 2**30, step)
        board.add_scalar("communication/gathered_MiB", record.bytes_gathered / 2**20, step)
        for after, when in (("_before", step - 1), ("", step)):
            for name in ("loss", "accuracy", "macro_f1"):
                value = getattr(record, f"eval_{name}{after}")
                if value is not None:
                    board.add_scalar(f"eval/{name}", value, when)
                prefix = "" if name == "loss" else f"{name}_"
                by_task = getattr(record, f"eval_{prefix}by_task{after}")
                for task, own in (by_task or {}).items():
                    board.add_scalar(f"eval/{name}/{task}", own, when)


def read_metrics(path: Path) -> list[StepMetrics]:
    """The records of a ``metrics.jsonl``, by rising step; no file, no records.

    A torn last line (a run that was killed while writing) is passed over, keys this version does
    not know are ignored, and of a repeated step the last line counts.

    Raises:
        UserError: another line is not a record.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    records: dict[int, StepMetrics] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = _from_line(line)
        except (ValueError, TypeError) as error:
            if number == len(lines):
                break
            raise UserError(
                f"{path}, line {number} is not a step record ({error}); remove the line"
            ) from None
        records[record.step] = record
    return [records[step] for step in sorted(records)]


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory this process has held so far.

    On CUDA what tensors took on ``device`` (not the allocator's cache, not the context), else the
    peak resident set, which includes Python and its libraries.
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


def format_bytes(count: float) -> str:
    """``1536`` -> ``1.50 KiB``: three digits in the largest unit that keeps 1 before the point."""
    units = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
    value, unit = float(count), 0
    while value >= 1000 and unit < len(units) - 1:
        value, unit = value / 1024, unit + 1
    if unit == 0:
        return f"{value:.0f} B"
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {units[unit]}"


def _to_line(record: StepMetrics) -> str:
    values = {key: _to_json(v) for key, v in asdict(record).items() if v is not None}
    return json.dumps(values, allow_nan=False) + "\n"


def _to_json(value: Any) -> Any:
    """JSON has no NaN: ``None`` stands for what is not finite."""
    if isinstance(value, dict):
        return {key: _to_json(number) for key, number in value.items()}
    return value if math.isfinite(value) else None


def _from_line(line: str) -> StepMetrics:
    values = json.loads(line)
    if not isinstance(values, dict):
        raise ValueError("not a JSON object")
    known = {field.name for field in fields(StepMetrics)}
    numbers: dict[str, Any] = {}
    for key in known & values.keys():
        value = values[key]
        if key in _BY_TASK and isinstance(value, dict):
            numbers[key] = {name: _number(f"{key}.{name}", own) for name, own in value.items()}
        else:
            numbers[key] = _number(key, value)
    return StepMetrics(**numbers)


def _number(key: str, value: Any) -> float:
    value = math.nan if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{key} is {value!r}, not a number")
    return value


def _cannot_write(path: Path, error: OSError) -> UserError:
    return UserError(
        f"cannot write {error.filename or path}: {error.strerror}; free space or give save.dir "
        "another directory, then resume"
    )
