"""End a run that stands still: stacks of all threads, the flight recorder, one line, exit code 1.

All of it runs in a thread while the main thread is blocked, perhaps in the run directory's file
system, in the log's lock or with the terminal's. So every part has a limit of time, locks that the
main thread may hold are not taken for the last line, and a timer in C ends the process at last.
"""

import faulthandler
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import partial
from pathlib import Path

from dist_peft.app.last_line import claim_last_line, reset_last_line
from dist_peft.core.flight_recorder import dump_flight_recorder
from dist_peft.core.log import FILE_ONLY, append_log_line, get_log_directory
from dist_peft.core.world import StallReport, World
from dist_peft.train.run_state import set_run_state

__all__ = ["allow_stall_exit", "end_stalled_run", "get_stall_handler"]

EXIT_SECONDS = 14
"""After this the process is ended whatever it waits for."""

FILE_SECONDS = 3.0
"""The longest wait for each file."""

_is_allowed = False


@contextmanager
def allow_stall_exit() -> Iterator[None]:
    """Let a stall end this process, inside: it is a command's and not a caller's of the library."""
    global _is_allowed
    reset_last_line()
    _is_allowed = True
    try:
        yield
    finally:
        _is_allowed = False


def get_stall_handler(world: World) -> Callable[[StallReport], None] | None:
    """Return the function that ends this process; None where it is not a command's."""
    return partial(end_stalled_run, world) if _is_allowed else None


def end_stalled_run(world: World, report: StallReport) -> None:
    """Write stacks, flight recorder, log and ``run_state.json``, print one line, and exit with 1.

    Returns only where the main thread is about to end the process for a reason of its own.

    Args:
        report: of ``core.stall_watch``.
    """
    nowhere = os.open(os.devnull, os.O_WRONLY)
    faulthandler.dump_traceback_later(EXIT_SECONDS, exit=True, file=nowhere)
    if not claim_last_line():
        return  # the main thread is at the same; the timer ends it if that does not end
    run_dir = get_log_directory()
    prefix = "" if world.size == 1 else f"rank {world.rank} on {world.host} stops: "
    line = f"{prefix}{report.text}"
    if run_dir is None:
        faulthandler.dump_traceback(file=2)
    else:
        file = run_dir / f"log.rank-{world.rank}.txt"
        if _finish_in_time(partial(_write_stacks, file, line)):
            line += f" (stacks: {file})"
        recorder = run_dir / f"flight_recorder_{world.rank}"
        _finish_in_time(partial(dump_flight_recorder, recorder))
        if world.is_first or report.first_is_silent:
            _finish_in_time(partial(_record_end, run_dir, line, world.is_first))
    with suppress(OSError):  # not through sys.stderr, whose lock the main thread may hold
        start = "\n" if os.isatty(2) else ""  # a progress bar may have left its line unfinished
        os.write(2, f"{start}dist-peft: {line}\n".encode())
        os.dup2(nowhere, 1)  # the line stays the last: the main thread may be at work
        os.dup2(nowhere, 2)
    report.wait_until_read()
    os._exit(1)


def _write_stacks(file: Path, line: str) -> None:
    with file.open("a", encoding="utf-8") as log_file:
        log_file.write(f"{datetime.now():%Y-%m-%d %H:%M:%S} {line}\n")
        log_file.flush()
        faulthandler.dump_traceback(file=log_file)


def _record_end(run_dir: Path, line: str, is_first: bool) -> None:
    set_run_state(run_dir, "failed", line, is_last=True)
    if is_first:
        logging.getLogger("dist_peft").error("%s", line, extra=FILE_ONLY)
    else:
        append_log_line(run_dir / "log.txt", line)


def _finish_in_time(action: Callable[[], object]) -> bool:
    """Call ``action`` and return whether it was done within ``FILE_SECONDS``."""
    done = threading.Event()

    def run() -> None:
        with suppress(Exception):
            action()
            done.set()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(FILE_SECONDS)
    return done.is_set()
