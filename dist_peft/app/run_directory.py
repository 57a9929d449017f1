"""Create a run directory, its log and its ``config.yaml``."""

import os
from pathlib import Path

from dist_peft.core.config.io import dump_config
from dist_peft.core.config.run import RunConfig
from dist_peft.core.errors import UserError
from dist_peft.core.log import setup_log
from dist_peft.core.world import World
from dist_peft.store.writer import write_atomically

__all__ = [
    "check_run_directory_writable",
    "make_run_directory",
    "open_run_directory",
    "write_run_config",
]


def check_run_directory_writable(run_dir: Path) -> None:
    """Check that ``run_dir`` can be created or written, without changing it.

    Raises:
        UserError: it is a file or not writable.
    """
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"save.dir {run_dir} is a file; give a directory")
    nearest = next(p for p in (run_dir, *run_dir.absolute().parents) if p.exists())
    if not nearest.is_dir():
        raise UserError(f"cannot write run directory {run_dir}: {nearest} is a file")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"cannot write run directory {run_dir}: no permission to write {nearest}")


def open_run_directory(run_dir: Path, world: World) -> None:
    """Create the directory and continue the log in its ``log.txt``."""
    with world.raise_together("prepare the run directory"):
        if world.is_first:
            make_run_directory(run_dir)
        setup_log(run_dir, world.rank, world.size)


def make_run_directory(run_dir: Path) -> None:
    """Create the directory; raises UserError if that is not possible."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write run directory {run_dir}: {error.strerror}") from None


def write_run_config(run_dir: Path, config: RunConfig) -> None:
    """Write ``config.yaml``, which merge and export rely on; raises UserError if it fails."""
    try:
        write_atomically(run_dir / "config.yaml", dump_config(config))
    except OSError as error:
        raise UserError(f"cannot write run directory {run_dir}: {error.strerror}") from None
