"""Write a directory so that it appears complete or not at all.

Everything goes to a hidden directory next to the final one, ``.NAME.partial``, which one rename
publishes. A killed process leaves the hidden directory; the next one that writes the same output
removes it. While a process lives it holds a lock on it, so that no other removes it.
"""

import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from dist_peft.core.errors import UserError
from dist_peft.store.fileio import sync_directory, translate_write_errors

__all__ = ["check_output_free", "publish_directory"]

_EXPORT_FILES = ("config.json", "adapter_config.json")
"""A directory that one of these files or a .gguf file lies in can be replaced as an export."""


def check_output_free(out: Path, *, overwrite: bool = False, inputs: Sequence[Path] = ()) -> None:
    """Check that output may be written to directory ``out``, without changing anything.

    Args:
        out: should not exist, or be an empty directory.
        overwrite: an export in its place may be replaced.
        inputs: directories that must not be replaced.

    Raises:
        UserError: it is a file, or holds something else.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; choose a new directory")
    parent = next(path for path in out.absolute().parents if path.exists())
    if not parent.is_dir():
        raise UserError(f"cannot write {out}: {parent} is a file; choose another place")
    if not out.exists() or not any(out.iterdir()):
        return
    if not overwrite:
        raise UserError(
            f"{out} is not empty; choose a new directory, or replace this one with --overwrite"
        )
    target = out.resolve()
    for path in (*inputs, Path.cwd()):
        if path.resolve().is_relative_to(target):
            raise UserError(f"--overwrite would remove {out}, which contains {path}")
    is_export = any((out / name).is_file() for name in _EXPORT_FILES) or any(out.glob("*.gguf"))
    if not is_export or (out / "config.yaml").exists():
        raise UserError(
            f"--overwrite replaces a model or an adapter, and {out} holds neither "
            f"{' nor '.join(_EXPORT_FILES)}; remove it yourself, or choose a new directory"
        )


@contextmanager
def publish_directory(out: Path) -> Iterator[Path]:
    """Yield an empty hidden directory that becomes ``out`` when the body ends.

    An existing ``out`` is replaced: ``check_output_free`` comes first where it may be the user's.
    After an error nothing is left of it.

    Raises:
        UserError: no permission, or another process writes the same output. Messages of the body
            name ``out`` instead of the hidden directory.
    """
    target = out.resolve()
    partial = target.with_name(f".{target.name}.partial")
    made = [path for path in target.parents if not path.exists()]
    with translate_write_errors(out, 0):
        target.parent.mkdir(parents=True, exist_ok=True)
        _restore_replaced(target)
        descriptor = _make_locked_directory(partial, out)
    try:
        yield partial
        with translate_write_errors(out, 0):
            _sync_tree(partial)
            _put_in_place(partial, target)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        for path in made:
            with suppress(OSError):
                path.rmdir()
        if isinstance(error, UserError) and str(partial) in str(error):
            raise UserError(str(error).replace(str(partial), str(out))) from None
        raise
    finally:
        os.close(descriptor)


def _make_locked_directory(partial: Path, out: Path) -> int:
    """Make an empty directory and lock it; return its descriptor, which holds the lock."""
    with suppress(FileNotFoundError):
        leftover = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
        try:
            _lock(leftover, out)
            shutil.rmtree(partial)
        finally:
            os.close(leftover)
    partial.mkdir()
    descriptor = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
    _lock(descriptor, out)
    return descriptor


def _lock(descriptor: int, out: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another process is writing {out} at this moment") from None
    except OSError:  # a file system without locks
        pass


def _get_replaced_path(target: Path) -> Path:
    return target.with_name(f".{target.name}.replaced")


def _restore_replaced(target: Path) -> None:
    """Undo a replacement that was killed between its two renames."""
    replaced = _get_replaced_path(target)
    if not replaced.exists():
        return
    if target.exists():
        shutil.rmtree(replaced)
    else:
        replaced.rename(target)


def _put_in_place(partial: Path, target: Path) -> None:
    replaced = _get_replaced_path(target)
    if target.is_dir() and not any(target.iterdir()):
        target.rmdir()
    elif target.exists():
        target.rename(replaced)
    try:
        os.rename(partial, target)
    except BaseException:
        if replaced.exists():
            replaced.rename(target)
        raise
    sync_directory(target.parent)
    if replaced.exists():
        shutil.rmtree(replaced)


def _sync_tree(directory: Path) -> None:
    """Write files and directories below ``directory`` to the disk."""
    for parent, _, names in os.walk(directory):
        for name in names:
            descriptor = os.open(os.path.join(parent, name), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_directory(Path(parent))
