"""A lock that one process holds while it builds something that others wait for.

It has to work where caches lie on clusters: network file systems without ``flock``, or with one
that holds within a host only. ``filelock.SoftFileLease`` needs no more than exclusive creation of a
file: the holder renews it every few seconds, and a process that sees no renewal for
``LEASE_SECONDS`` of its own clock takes it over, on whatever host the holder was killed.

A holder that was only frozen for so long continues next to its successor. A result built under this
lock must therefore be published by a rename, after which either one is right.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import SoftFileLease, Timeout

from dist_peft.core.stop_signals import raise_if_stop_requested

__all__ = ["LEASE_SECONDS", "hold_build_lock"]

log = logging.getLogger("dist_peft")

LEASE_SECONDS = 30.0
"""The same in all processes that share a lock."""

_LOOK_SECONDS = 0.2
_REMIND_SECONDS = 30.0


@contextmanager
def hold_build_lock(path: Path, beat: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Wait for the lock without a limit of time, and hold it.

    Where the lock file cannot be made there is no lock: the work is done twice.

    Args:
        path: of the lock file; removed when the lock is released.
        beat: called a few times a second while another process holds it.

    Raises:
        StopRequested: a signal has reached this process while it waited.
    """
    lock = SoftFileLease(path, lease_duration=LEASE_SECONDS, poll_interval=_LOOK_SECONDS)
    empty = _EmptyMarker(path)
    remind = time.monotonic() + _REMIND_SECONDS
    while not lock.is_locked:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise_if_stop_requested()
            beat()
            empty.remove_when_stale()
            if time.monotonic() > remind:
                log.info("waiting for the process that holds %s", path)
                remind = time.monotonic() + _REMIND_SECONDS
            time.sleep(_LOOK_SECONDS)
        except OSError as error:
            log.warning("%s: no lock (%s)", path, error)
            break
    try:
        yield
    finally:
        if lock.is_locked:
            lock.release()


class _EmptyMarker:
    """A lock file without contents, which ``filelock`` never takes over.

    A process leaves one if it is killed between creating and writing the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, float] | None = None

    def remove_when_stale(self) -> None:
        """Remove the file if it has been the same empty one for ``LEASE_SECONDS``."""
        with suppress(OSError):
            found, now = self._path.stat(), time.monotonic()
            if found.st_size:
                self._seen = None
            elif self._seen is None or self._seen[0] != found.st_ino:
                self._seen = (found.st_ino, now)
            elif now - self._seen[1] > LEASE_SECONDS:
                self._path.unlink()
