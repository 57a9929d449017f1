"""Turn signals into a request to stop after the current step."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["catch_stop_signals"]


@contextmanager
def catch_stop_signals() -> Iterator[Callable[[], bool]]:
    """Yield a function that returns whether a signal has requested a stop after the current step.

    The signals are SIGTERM, SIGUSR1 (sent by schedulers before the time limit) and Ctrl-C; a second
    Ctrl-C stops at once.
    """
    caught: list[int] = []

    def record_signal(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.write(2, b"\nstopping after this step; Ctrl-C again stops at once\n")

    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = [signal.signal(number, record_signal) for number in numbers]
    try:
        yield lambda: bool(caught)
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
