"""Signals that request a stop: noted from the first line of a command, answered at a safe point.

An entry point imports this module and calls ``note_stop_signals`` before anything else: importing
torch takes seconds, on a cold shared file system minutes, and a signal whose handler is not
installed ends the process. So nothing heavy is imported here.

A noted signal changes nothing by itself. Long phases ask for it between two pieces of work
(``is_stop_requested``, ``raise_if_stop_requested``); training saves a checkpoint, a phase before
the first step ends with ``StopRequested``, and either way the exit code is ``RESUMABLE``. Commands
that have nothing to resume end at once instead (``interrupt_on_stop_signals``).
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

__all__ = [
    "RESUMABLE",
    "STOP_SIGNALS",
    "StopRequested",
    "catch_stop_signals",
    "describe_stop_request",
    "get_interrupt_exit_code",
    "interrupt_on_stop_signals",
    "is_stop_requested",
    "note_stop_signals",
    "raise_if_stop_requested",
    "request_stop",
]

RESUMABLE = 75
"""Exit code after a stop on a signal: the same command resumes."""

STOP_SIGNALS = (
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGINT,
    signal.SIGUSR1,
    signal.SIGUSR2,
)
"""Signals of schedulers (before the time limit, preemption), of a closed terminal, and Ctrl-C."""


class StopRequested(Exception):
    """A signal has requested a stop in a phase that has no checkpoint to write.

    Attributes:
        is_alone: the other ranks do not know of it; each such rank prints the message.
    """

    def __init__(self, message: str = "", *, is_alone: bool = False) -> None:
        super().__init__(message or f"stopped on {describe_stop_request()}")
        self.is_alone = is_alone


_handlers_before: dict[int, Any] = {}
"""The handlers that were replaced, by signal; empty while no signal is noted."""

_requests: list[str] = []
"""Names of the signals so far, also of those that reached another rank."""


def note_stop_signals() -> None:
    """Note ``STOP_SIGNALS`` from now on; a second Ctrl-C interrupts at once.

    SIGHUP stays ignored where it is (``nohup``). Called again, or in a thread, it does nothing.
    """
    if _handlers_before or threading.current_thread() is not threading.main_thread():
        return
    for number in STOP_SIGNALS:
        before = signal.getsignal(number)
        if number != signal.SIGHUP or before is not signal.SIG_IGN:
            _handlers_before[number] = before
            signal.signal(number, _note_signal)


def _note_signal(number: int, frame: FrameType | None) -> None:
    _requests.append(signal.Signals(number).name)
    if number == signal.SIGINT:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.write(2, b"\nstopping at the next safe point; Ctrl-C again stops at once\n")


def interrupt_on_stop_signals() -> None:
    """Let each signal end the command as Ctrl-C does: it has nothing that could be resumed.

    Raises:
        KeyboardInterrupt: a signal was noted before; later, in the main thread, on each signal.
    """
    for number in _handlers_before:
        signal.signal(number, _interrupt)
    if _requests:
        raise KeyboardInterrupt


def _interrupt(number: int, frame: FrameType | None) -> None:
    _requests.append(signal.Signals(number).name)
    raise KeyboardInterrupt


def get_interrupt_exit_code() -> int:
    """Return the exit code after a ``KeyboardInterrupt``: 128 + the number of the last signal."""
    names = [name for name in _requests if name in signal.Signals.__members__]
    return 128 + (signal.Signals[names[-1]] if names else signal.SIGINT)


@contextmanager
def catch_stop_signals() -> Iterator[Callable[[], bool]]:
    """Note signals inside; yield ``is_stop_requested``.

    Handlers and requests of before are restored at the end, unless signals were noted already.
    """
    if _handlers_before:
        yield is_stop_requested
        return
    note_stop_signals()
    try:
        yield is_stop_requested
    finally:
        for number, handler in _handlers_before.items():
            signal.signal(number, handler)
        _handlers_before.clear()
        _requests.clear()


def is_stop_requested() -> bool:
    """Return whether a signal has requested a stop, of this process or of another rank."""
    return bool(_requests)


def request_stop(reason: str) -> None:
    """Request a stop as a signal does, such as for a signal that has reached another rank."""
    _requests.append(reason)


def describe_stop_request() -> str:
    """Return the name of the first signal, as it is put into a message."""
    return _requests[0] if _requests else "a signal"


def raise_if_stop_requested() -> None:
    """Raise ``StopRequested`` if a signal has requested a stop.

    For phases before the first step that run without collectives: ``World.raise_together`` then
    raises on every rank.

    Raises:
        StopRequested: so.
    """
    if _requests:
        raise StopRequested
