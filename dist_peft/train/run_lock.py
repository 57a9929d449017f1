"""A run directory belongs to one run: ``run.lock`` and its heartbeat.

The file names the holder (host, process, job); a thread touches it every few seconds. A second run
is refused unless the holder is gone: its process on this machine has ended, it was of the same job
(a requeued one, on other hosts), or the last heartbeat is older than ``STALE_SECONDS``.

Ages are differences of two times of the same file system, so clocks of hosts need not agree.
"""

import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import psutil

from dist_peft.core.errors import UserError
from dist_peft.core.machine import identify_machine

__all__ = ["LOCK_NAME", "LockHolder", "RunLock", "raise_if_taken_over"]

log = logging.getLogger("dist_peft")

LOCK_NAME = "run.lock"
STALE_SECONDS = 60.0
BEAT_SECONDS = 10.0
_TAKEOVER_SECONDS = 10.0
"""Age from which on the mark of a takeover is that of a killed process."""

_held: "RunLock | None" = None
"""The lock of the run of this process."""


@dataclass(frozen=True)
class LockHolder:
    """The process that a run directory belongs to.

    Attributes:
        host, pid: where it runs.
        machine: boot and process namespace, within which ``pid`` identifies a process.
        started: time of its start (seconds since the epoch); tells it from a later one of its pid.
        job: the launcher's name of the run; empty where it has none.
        token: random, different for each run.
    """

    host: str
    pid: int
    machine: str
    started: float
    job: str
    token: str

    @classmethod
    def describe_this_process(cls, job: str) -> Self:
        me = psutil.Process()
        token = secrets.token_hex(8)
        return cls(socket.gethostname(), me.pid, identify_machine(), me.create_time(), job, token)

    @classmethod
    def read_from(cls, file: Path) -> "LockHolder | None":
        """Return the holder that ``file`` names; None if it names none (yet).

        Raises:
            FileNotFoundError: there is no such file.
        """
        try:
            tree = json.loads(file.read_text(encoding="utf-8"))
            holder = cls(**tree)
            return holder if type(holder.pid) is int else None
        except (ValueError, TypeError, RecursionError):
            return None

    def has_ended(self) -> bool | None:
        """Return whether the process has ended; None if it runs on another machine."""
        if self.machine != identify_machine():
            return None
        try:
            return abs(psutil.Process(self.pid).create_time() - float(self.started)) > 1
        except (psutil.Error, ValueError, OverflowError, TypeError):
            return True

    def __str__(self) -> str:
        job = f", {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}"


class RunLock:
    """The lock of a run directory, held between ``acquire`` and ``release``."""

    def __init__(self, run_dir: Path, job: str = "") -> None:
        self.path = run_dir / LOCK_NAME
        self.holder = LockHolder.describe_this_process(job)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.taken_over_by: str | None = None

    def check_free(self) -> None:
        """Check that the directory may be used, without changing anything.

        Raises:
            UserError: it belongs to another run.
        """
        with suppress(FileNotFoundError, NotADirectoryError):
            self._check_holder(time.time() - self.path.stat().st_mtime)

    def acquire(self) -> None:
        """Take the lock and keep it by a thread. The directory must exist.

        Raises:
            UserError: it belongs to another run, or cannot be written.
        """
        try:
            if not self._create_file():
                with self._takeover():
                    with suppress(FileNotFoundError):
                        self._check_holder(self._measure_age())
                        log.info("taking over %s: its run has ended", self.path)
                    self._replace_file()
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror or error}") from None
        global _held
        _held = self
        self._thread = threading.Thread(target=self._beat, name="run lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Give the directory back, if it is still this run's. Harmless if it was not acquired."""
        global _held
        if self._thread is None:
            return
        self._stop.set()
        self._thread.join()
        self._thread = None
        _held = None if _held is self else _held
        with suppress(OSError):
            if self._is_mine():
                self.path.unlink()

    def _check_holder(self, age: float) -> None:
        holder = LockHolder.read_from(self.path)
        if holder is not None:
            ended = holder.has_ended()
            same_job = holder.job != "" and holder.job == self.holder.job
            if ended or (ended is None and same_job):
                return
            if ended is None and age > STALE_SECONDS:
                return
        elif age > STALE_SECONDS:
            return
        raise UserError(
            f"save.dir {self.path.parent} belongs to another run: {holder or 'one that starts'} "
            f"(last sign of life {max(age, 0.0):.0f} s ago). Wait for its end, or give this run "
            "another save.dir"
        )

    def _measure_age(self) -> float:
        """Return the seconds since the last heartbeat, by the clock of the file system."""
        probe = self.path.with_name(f".{LOCK_NAME}.{self.holder.token}")
        probe.touch()
        try:
            return probe.stat().st_mtime - self.path.stat().st_mtime
        finally:
            probe.unlink(missing_ok=True)

    def _create_file(self) -> bool:
        """Create the file if there is none; return whether this process did."""
        temporary = self._write_temporary()
        try:
            os.link(temporary, self.path)  # atomic on network file systems too
        except FileExistsError:
            return False
        except OSError:  # a file system without links
            if self.path.exists():
                return False
            os.replace(temporary, self.path)
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def _replace_file(self) -> None:
        os.replace(self._write_temporary(), self.path)

    def _write_temporary(self) -> Path:
        temporary = self.path.with_name(f".{LOCK_NAME}.{self.holder.token}.tmp")
        temporary.write_text(json.dumps(asdict(self.holder), indent=1) + "\n", encoding="utf-8")
        return temporary

    @contextmanager
    def _takeover(self) -> Iterator[None]:
        """Let one process at a time look at the holder and replace it."""
        mark = self.path.with_name(f".{LOCK_NAME}.takeover")
        with suppress(FileNotFoundError):
            if time.time() - mark.stat().st_mtime > _TAKEOVER_SECONDS:
                mark.unlink()
        try:
            os.close(os.open(mark, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            raise UserError(
                f"another run is taking over save.dir {self.path.parent} at this moment"
            ) from None
        try:
            yield
        finally:
            mark.unlink(missing_ok=True)

    # -- heartbeat -----------------------------------------------------------------------------

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            with suppress(OSError):  # a file server that is away for some time
                self.touch()
            if self.taken_over_by is not None:
                return

    def touch(self) -> None:
        """Renew the heartbeat; sets ``taken_over_by`` if the file names another run."""
        try:
            if self._is_mine():
                os.utime(self.path)
                return
        except FileNotFoundError:
            if self.path.parent.is_dir():
                self._create_file()
            return
        self.taken_over_by = str(LockHolder.read_from(self.path) or "another run")

    def _is_mine(self) -> bool:
        holder = LockHolder.read_from(self.path)
        return holder is not None and holder.token == self.holder.token


def raise_if_taken_over() -> None:
    """Raise if the run directory of this process's run has been taken over.

    Raises:
        UserError: this process stood still for so long that another run took over.
    """
    if _held is not None and _held.taken_over_by is not None:
        raise UserError(
            f"save.dir {_held.path.parent} was taken over by {_held.taken_over_by}, since this run "
            f"gave no sign of life for more than {STALE_SECONDS:.0f} s; it ends without writing"
        )
