"""A limit for work inside a library that may compile, download or wait without a word."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["NotVerified", "time_limit"]


class NotVerified(Exception):
    """An export was not compared with the trained model; the message says why, and the fix."""


class _TimeUp(BaseException):
    """Not an ``Exception``: libraries catch those and carry on."""


@contextmanager
def time_limit(what: str, seconds: float) -> Iterator[None]:
    """End the body after ``seconds``; in the main thread only, elsewhere there is no limit.

    Signals reach Python between two operations of a library, and processes that it waits for.

    Raises:
        NotVerified: the time is up; the message names ``what``.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(number: int, frame: FrameType | None) -> None:
        raise _TimeUp

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except _TimeUp:
        raise NotVerified(
            f"{what} took longer than {seconds / 60:g} minutes; give it more with --verify-minutes"
        ) from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
