"""The run directory of one run: claim it, find out that hosts share it, record how the run ends."""

import logging
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from dist_peft.app.output_places import refuse_taken_place
from dist_peft.core.config.io import dump_config
from dist_peft.core.config.moved_paths import PATHS_NAME, format_path_record
from dist_peft.core.config.run import RunConfig
from dist_peft.core.errors import RunFailure, UserError
from dist_peft.core.input_paths import refuse_special_files
from dist_peft.core.log import setup_log
from dist_peft.core.world import World
from dist_peft.store.writer import write_atomically
from dist_peft.train.checkpoint import CheckpointManager
from dist_peft.train.checkpoint_files import wait_for_files
from dist_peft.train.run_lock import RunLock
from dist_peft.train.run_state import read_ended_state, restore_state_file, set_run_state
from dist_peft.train.step_metrics import read_metrics

__all__ = [
    "RunDirectory",
    "check_shared_directory",
    "make_run_directory",
    "write_run_config",
]

log = logging.getLogger("dist_peft")

_APPENDED = ("metrics.jsonl",)
"""Written in place, as logs are; other files are replaced by a rename."""

_SEEN_SECONDS = 10.0
"""The longest wait for a directory or file of another host; network file systems show them late."""


class RunDirectory:
    """A run directory, from the first check to the end of the run; a context manager.

    Nothing is written before ``open``. At the end the first rank records in ``run_state.json`` how
    the run ended, and the directory is free for the next run.
    """

    def __init__(self, path: Path, world: World) -> None:
        self.path = path
        self.world = world
        self._lock = RunLock(path, world.job)
        self._is_open = False
        self._ended = False
        self._state_before: bytes | None = None

    def check_usable(self) -> None:
        """Check, on the first rank, that the directory can be written and belongs to no other run.

        Raises:
            UserError: it is a file, not writable, or another run's.
        """
        if not self.world.is_first:
            return
        run_dir = self.path
        refuse_taken_place(run_dir, "save.dir", new=False)
        for file in (*run_dir.glob("log*.txt"), *map(run_dir.joinpath, _APPENDED)):
            if file.is_symlink():
                raise UserError(
                    f"{file} is a link to {file.resolve()}, to which the run would write; replace "
                    "the link by the file, or choose another save.dir"
                )
        refuse_special_files(run_dir)
        for file in (run_dir / "metrics.jsonl", *_glob_inner(run_dir, "metrics.jsonl")):
            read_metrics(file)  # else a resumed run would find the damage after its first writes
        if run_dir.exists() and not run_dir.is_dir():
            raise UserError(f"save.dir {run_dir} is a file; give a directory")
        nearest = next(p for p in (run_dir, *run_dir.absolute().parents) if p.exists())
        if not nearest.is_dir():
            raise UserError(f"cannot write run directory {run_dir}: {nearest} is a file")
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise UserError(
                f"cannot write run directory {run_dir}: no permission to write {nearest}"
            )
        self._lock.check_free()

    def open(self) -> None:
        """Create and claim the directory, and continue the log in its ``log.txt``. Collective.

        Raises:
            UserError: on every rank: it cannot be written, is another run's, or is not one
                directory that all hosts share. A directory made here is removed again.
        """
        if self._is_open:
            return
        made: list[Path] = []
        try:
            with self.world.raise_together("prepare the run directory"):
                if self.world.is_first:
                    made = _make_directories(self.path)
                    self._lock.acquire()
            check_shared_directory(self.path, self.world)
        except Exception:
            self._lock.release()
            for directory in reversed(made):
                with suppress(OSError):
                    directory.rmdir()
            raise
        self._is_open = True
        with self.world.raise_together("open the log"):
            setup_log(self.path, self.world.rank, self.world.size)
            if self.world.is_first:
                _remove_leftovers(self.path, self.world)
                self._state_before = read_ended_state(self.path)
                set_run_state(self.path, "running")

    def record_exit_code(self, code: int) -> int:
        """Record that the run ended with exit code ``code``, and return it."""
        if code:
            self._record_end("stopped", "a signal; the same command resumes")
        else:
            self._record_end("finished", "")
        return code

    def _record_refusal(self, reason: str) -> None:
        """Record that the run was refused; one that had ended before keeps its own state."""
        if self._state_before is None or not restore_state_file(self.path, self._state_before):
            self._record_end("refused", reason)
        self._ended = True

    def _record_end(self, state: str, reason: str) -> None:
        if self._is_open and self.world.is_first and not self._ended:
            self._ended = True
            set_run_state(self.path, state, reason)  # type: ignore[arg-type]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, UserError):
            self._record_refusal(str(error))
        elif isinstance(error, RunFailure):
            self._record_end("failed", str(error))
        elif isinstance(error, KeyboardInterrupt):
            self._record_end("stopped", "interrupted in the middle of a step")
        elif error is not None:
            self._record_end("failed", f"{type(error).__name__}: {error}")
        self._lock.release()


def check_shared_directory(directory: Path, world: World) -> None:
    """Check that every rank's ``directory`` is the first rank's. Collective.

    Each rank writes a file whose name no earlier run has used, and the first rank looks for all.

    Raises:
        UserError: on every rank: it is not, or a rank cannot write it.
    """
    if world.size == 1:
        return
    token = world.gather_integers([secrets.randbits(62)])[0][0]
    names = [f".probe-{token:x}-{rank}" for rank in range(world.size)]
    mine = directory / names[world.rank]
    fix = "save.dir must be one directory that all hosts share and every rank can write"
    try:
        with world.raise_together("write a probe file"):
            end = time.monotonic() + _SEEN_SECONDS
            while not directory.is_dir():
                if time.monotonic() > end:
                    raise UserError(
                        f"rank {world.rank} on {world.host} does not see {directory}, which rank 0 "
                        f"has; {fix}"
                    )
                time.sleep(0.05)
            try:
                mine.touch()
            except OSError as error:
                raise UserError(
                    f"rank {world.rank} on {world.host} cannot write {directory}: "
                    f"{error.strerror}; {fix}"
                ) from None
        with world.raise_together("look for the probe files"):
            if world.is_first:
                missing = wait_for_files(directory, dict.fromkeys(names, 0), _SEEN_SECONDS)
                if missing is not None:
                    rank = missing.rpartition("-")[2]
                    raise UserError(
                        f"rank 0 on {world.host} does not see in {directory} the file that rank "
                        f"{rank} wrote to a directory of this name; {fix}"
                    )
    finally:
        mine.unlink(missing_ok=True)


def _make_directories(path: Path) -> list[Path]:
    """Make ``path`` and its parents; return those that did not exist, outermost first."""
    made = [p for p in (path, *path.absolute().parents) if not p.exists()][::-1]
    make_run_directory(path)
    return made


def _remove_leftovers(run_dir: Path, world: World) -> None:
    """Remove what killed runs of this directory have left half written."""
    for directory in (*run_dir.glob("checkpoints"), *_glob_inner(run_dir, "checkpoints")):
        CheckpointManager(directory, 1, world).remove_unfinished()
    patterns = (".*.tmp", ".probe-*", "checkpoints/.*.tmp")
    outer = [file for pattern in patterns for file in run_dir.glob(pattern)]
    for file in (*outer, *_glob_inner(run_dir, ".*.tmp")):
        with suppress(OSError):
            file.unlink()


def _glob_inner(run_dir: Path, pattern: str) -> Iterator[Path]:
    """Yield files of the runs in a run's directory: tasks, and points of a sweep."""
    for inner in ("tasks/*", "point-*"):
        yield from run_dir.glob(f"{inner}/{pattern}")


def make_run_directory(run_dir: Path) -> None:
    """Create the directory; raises UserError if that is not possible."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write run directory {run_dir}: {error.strerror}") from None


def write_run_config(run_dir: Path, config: RunConfig) -> None:
    """Write ``config.yaml``, which merge and export rely on, and where its paths lead.

    Raises:
        UserError: the disk is full or not writable.
    """
    try:
        record = format_path_record(config.dump_stored_tree(), run_dir)
        write_atomically(run_dir / PATHS_NAME, record)
        write_atomically(run_dir / "config.yaml", dump_config(config))
    except OSError as error:
        raise UserError(f"cannot write run directory {run_dir}: {error.strerror}") from None
