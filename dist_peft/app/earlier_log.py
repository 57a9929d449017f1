"""The last line of a command that ends before it has opened its run directory.

A refused command changes no file of a run, with one exception: the ``log.txt`` that an earlier run
has left in its directory says why the command ended, too. Whoever looks there after a night sees
that the run was started again, and not only in the lost output of a terminal.
"""

import stat
from contextlib import suppress
from pathlib import Path

from dist_peft.core.errors import UserError
from dist_peft.core.log import append_log_line, get_log_directory
from dist_peft.core.world import World
from dist_peft.train.run_lock import LOCK_NAME, RunLock
from dist_peft.train.run_state import STATE_NAME

__all__ = ["append_to_earlier_log", "name_run_directory"]

_run_dir: Path | None = None
"""The run directory of the command of this process, on the rank that writes its log."""


def name_run_directory(run_dir: Path | None, world: World) -> None:
    """Note, on the first rank, the directory that the command will open; None: it opens none."""
    global _run_dir
    _run_dir = run_dir if world.is_first else None


def append_to_earlier_log(line: str) -> None:
    """Append ``line`` to ``log.txt`` of the noted directory, unless this process has opened a log.

    Nothing is created. Nothing is written either where the directory is not a run's, belongs to a
    run that is at work, or has a link or another special file in the place of its files.
    """
    if _run_dir is None or get_log_directory() is not None:
        return
    with suppress(OSError, UserError):
        log_file, lock = _run_dir / "log.txt", _run_dir / LOCK_NAME
        files = [log_file, _run_dir / STATE_NAME]
        files += [lock] if lock.is_symlink() or lock.exists() else []
        if all(stat.S_ISREG(file.lstat().st_mode) for file in files):
            RunLock(_run_dir).check_free()
            append_log_line(log_file, line)
