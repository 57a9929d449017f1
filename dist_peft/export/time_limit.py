"""Limit the time spent in a library that may compile, download or wait silently."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["VerificationSkipped", "enforce_time_limit"]


class VerificationSkipped(Exception):
    """An export could not be compared with the trained model; the message has reason and fix."""


class _TimeLimitExceeded(BaseException):
    """Not an ``Exception``: libraries catch those and continue."""


@contextmanager
def enforce_time_limit(what: str, seconds: float) -> Iterator[None]:
    """Interrupt the body after ``seconds``; in the main thread only, elsewhere there is no limit.

    A signal is handled between two operations of a library, or while it waits for a process.

    Raises:
        NotVerified: the time is up; the message begins with the given description.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def raise_time_limit(number: int, frame: FrameType | None) -> None:
        raise _TimeLimitExceeded

    before = signal.signal(signal.SIGALRM, raise_time_limit)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except _TimeLimitExceeded:
        raise VerificationSkipped(
            f"{what} took longer than {seconds / 60:g} minutes; raise the limit with "
            "--verify-minutes"
        ) from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
