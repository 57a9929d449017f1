"""The logger ``dist_peft``: handlers of the terminal and of ``log.txt``, by rank.

Every module logs through ``logging.getLogger("dist_peft")``; one call of ``setup_log`` per process
decides where lines go::

    rank 0         stderr: info and above, plain      run_dir/log.txt: the same with time and level
    other ranks    stderr: warnings and above, each with its rank; no file
    a failed rank  run_dir/log.rank-N.txt: the traceback (``write_traceback``)

Lines on stderr go through ``tqdm.write``, which lifts a progress bar out of the way. Records logged
with ``extra=FILE_ONLY`` skip the terminal: values that the bar shows there are still found in the
file. Records with ``extra=ONCE`` are the same on every rank; only rank 0 shows them.

``set_verbosity`` moves the levels: ``quiet`` leaves warnings and errors on the terminal, without a
progress bar, ``verbose`` adds debug lines there and in the file, and other ranks' info lines.
"""

import logging
import os
import sys
import traceback
from contextlib import suppress
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from dist_peft.core.errors import UserError
from dist_peft.core.redaction import redact_text

__all__ = [
    "FILE_ONLY",
    "ONCE",
    "append_log_line",
    "close_log",
    "get_log_directory",
    "is_quiet",
    "set_verbosity",
    "setup_log",
    "write_traceback",
]

FILE_ONLY = {"file_only": True}
"""Pass as ``extra`` to keep a record off the terminal."""

ONCE = {"once": True}
"""Pass as ``extra`` of a record that is the same on every rank."""

_verbosity: Literal["quiet", "normal", "verbose"] = "normal"

_directory: Path | None = None
"""The run directory of this process, on every rank."""


def set_verbosity(verbosity: Literal["quiet", "normal", "verbose"]) -> None:
    """Choose the lines of the terminal, from the next ``setup_log`` on."""
    global _verbosity
    _verbosity = verbosity


def is_quiet() -> bool:
    """Return whether the terminal shows warnings and errors only."""
    return _verbosity == "quiet"


def setup_log(
    run_dir: Path | None, rank: int, world_size: int, *, hold: bool = False
) -> logging.Logger:
    """Send the lines of logger ``dist_peft`` to stderr and, on rank 0, to ``run_dir/log.txt``.

    With ``hold`` rank 0 keeps them in memory as well, and the next call that has a ``run_dir``
    writes them there first: a command that is refused leaves no file, one that is not has its
    whole log in one.

    May be called again, such as once the run directory is known: the last call holds. An existing
    ``log.txt`` is appended to, so that a resumed run has one log.

    Raises:
        UserError: ``log.txt`` cannot be written.
    """
    held = _take_held_records(logging.getLogger("dist_peft"))
    logger = close_log()
    global _directory
    _directory = run_dir
    terminal = _TerminalHandler("" if world_size == 1 else f"[rank {rank}] ")
    handlers: list[logging.Handler] = [terminal]
    lowest = logging.DEBUG if _verbosity == "verbose" else logging.INFO
    terminal.setLevel(logging.WARNING if is_quiet() else lowest)
    if rank != 0:
        terminal.shows_rank = True
        if _verbosity != "verbose":
            terminal.setLevel(logging.WARNING)
        terminal.addFilter(lambda record: not getattr(record, "once", False))
    elif run_dir is not None:
        file = _open_log_file(run_dir / "log.txt")
        for record in held:
            file.handle(record)
        handlers.append(file)
    elif hold:
        handlers.append(_HeldRecordsHandler(held))
    for handler in handlers:
        logger.addHandler(handler)
    logger.setLevel(lowest)
    logger.propagate = False  # a root handler of some library would print each line again
    return logger


def close_log() -> logging.Logger:
    """Close ``log.txt`` and reset the logger to Python's defaults. Harmless if not set up."""
    global _directory
    _directory = None
    logger = logging.getLogger("dist_peft")
    for handler in list(logger.handlers):
        if isinstance(handler, _TerminalHandler | _LogFileHandler | _HeldRecordsHandler):
            logger.removeHandler(handler)
            handler.close()
    if logger.level != logging.NOTSET:  # setting it empties the caches of all loggers
        logger.setLevel(logging.NOTSET)
    logger.propagate = True
    return logger


def get_log_directory() -> Path | None:
    """Return the run directory that the log is written to; None before a run has one."""
    return _directory


def write_traceback(error: BaseException, rank: int) -> Path | None:
    """Append the traceback of ``error`` to ``log.rank-N.txt`` of the run directory.

    Returns:
        The file; None where there is no run directory or it cannot be written: the traceback is
        then on stderr.
    """
    text = redact_text("".join(traceback.format_exception(error)))
    if _directory is not None:
        file = _directory / f"log.rank-{rank}.txt"
        try:
            # messages of exceptions may quote data
            opener = partial(os.open, mode=0o600)
            with open(file, "a", encoding="utf-8", opener=opener) as log_file:
                log_file.write(f"{datetime.now():%Y-%m-%d %H:%M:%S} rank {rank}\n{text}\n")
        except OSError:
            pass
        else:
            return file
    sys.stderr.write(text)
    return None


def append_log_line(file: Path, line: str) -> None:
    """Append an error to a ``log.txt`` that this process has not opened: its rank 0 has ended."""
    now = datetime.now()
    line = redact_text(line)
    with suppress(OSError), file.open("a", encoding="utf-8") as log_file:
        log_file.write(f"{now:%Y-%m-%d %H:%M:%S},{now.microsecond // 1000:03d} ERROR {line}\n")


class _TerminalHandler(logging.Handler):
    """Lines for people: the message alone, with level and rank where they matter."""

    shows_rank = False
    """Whether lines below a warning have the rank, too."""

    def __init__(self, rank_prefix: str) -> None:
        super().__init__(logging.INFO)
        self.rank_prefix = rank_prefix
        self.addFilter(lambda record: not getattr(record, "file_only", False))

    def format(self, record: logging.LogRecord) -> str:
        text = redact_text(super().format(record))
        if record.levelno < logging.WARNING:
            return f"{self.rank_prefix}{text}" if self.shows_rank else text
        return f"{self.rank_prefix}{record.levelname.lower()}: {text}"

    def emit(self, record: logging.LogRecord) -> None:
        # the stream of this moment, not of set-up: it may have been redirected since
        tqdm.write(self.format(record), file=sys.stderr)
        sys.stderr.flush()


class _LogFileHandler(logging.FileHandler):
    """``log.txt``. A file that cannot be written any more, such as on a full disk, is named once on
    stderr; the run continues, or ends with an error of its own."""

    _has_failed = False

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._has_failed:
            self._has_failed = True
            reason = error.strerror or error
            tqdm.write(f"warning: cannot write {self.baseFilename}: {reason}", file=sys.stderr)

    def close(self) -> None:
        with suppress(OSError):  # the lines that did not fit
            super().close()


class _RedactingFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return redact_text(super().format(record))


class _HeldRecordsHandler(logging.Handler):
    """Records of a command that has no run directory yet."""

    def __init__(self, records: list[logging.LogRecord]) -> None:
        super().__init__(logging.INFO)
        self.records = records

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


def _take_held_records(logger: logging.Logger) -> list[logging.LogRecord]:
    return [r for h in logger.handlers if isinstance(h, _HeldRecordsHandler) for r in h.records]


def _open_log_file(path: Path) -> _LogFileHandler:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = _LogFileHandler(path, encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror}; give save.dir a writable directory"
        ) from None
    handler.setFormatter(_RedactingFormatter("%(asctime)s %(levelname)s %(message)s"))
    return handler
