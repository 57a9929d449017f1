"""Paths from users: text that cannot be a path, and files that must not be opened.

Opening a named pipe waits for a writer, perhaps for ever, and some devices never end. Directories
that were downloaded or copied can hold both.
"""

import os
import stat
from pathlib import Path

from dist_peft.core.errors import UserError

__all__ = ["find_path_fault", "refuse_special_file", "refuse_special_files"]

_NAME_BYTES = 255  # NAME_MAX of Linux and macOS
_PATH_BYTES = 4096

_SPECIAL = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def find_path_fault(text: str) -> str | None:
    """Return why ``text`` cannot be the path of a file or directory; None if it can."""
    if not text.strip():
        return "an empty path; give a file or directory"
    if "\0" in text:
        return "a path with a null character; remove it"
    longest = max(len(os.fsencode(part)) for part in text.split("/"))
    if longest > _NAME_BYTES or len(os.fsencode(text)) >= _PATH_BYTES:
        return f"a path that is too long (a name in it has {longest} bytes); give a shorter one"
    return None


def refuse_special_file(path: Path) -> None:
    """Refuse a pipe, socket or device, and links to one.

    Raises:
        UserError: it is one. A path that does not exist is not.
    """
    try:
        kind = _SPECIAL.get(stat.S_IFMT(path.stat().st_mode))
    except OSError:
        return
    if kind is not None:
        raise UserError(
            f"{path} is {kind}, not a regular file: reading it might never end; put the file there"
        )


def refuse_special_files(directory: Path) -> None:
    """Refuse a directory that has a pipe, socket or device among its entries.

    Raises:
        UserError: naming the first.
    """
    try:
        names = sorted(os.listdir(directory))
    except OSError:
        return
    for name in names:
        refuse_special_file(directory / name)
