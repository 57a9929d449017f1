"""Positioned file access for the store: exact reads and writes, few open files, readable errors.

``os.preadv`` fills memory that exists already and ``os.pwrite`` sends it, so no byte is copied in
between and the order of the rows is free. Nothing is mapped: an mmap'ed page counts as this
process's memory as long as the kernel likes, and a file that shrinks under a map kills the process
with SIGBUS instead of raising.
"""

import errno
import os
import re
import secrets
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dist_peft.core.errors import UserError

__all__ = [
    "OpenFiles",
    "make_temporary_name",
    "read_exactly",
    "read_strided",
    "remove_temporary_files",
    "sync_directory",
    "translate_read_errors",
    "translate_write_errors",
    "write_exactly",
]

_MOST_PIECES_A_CALL = min(1024, os.sysconf("SC_IOV_MAX"))

# One call moves at most 2 GiB on Linux and fails above it on macOS.
_MOST_BYTES_A_CALL = 1 << 30

# Writes of 2 MiB and more were seen to take up to ten times the system time of smaller ones where
# memory had been in use for long, probably to make room for pages of that size.
_MOST_BYTES_A_WRITE = 1 << 19


class OpenFiles:
    """File descriptors by path, opened when first needed, at most ``limit`` at a time; more only
    where as many are held at once."""

    def __init__(self, flags: int, limit: int = 16) -> None:
        self._flags = flags
        self._limit = limit
        self._descriptors: OrderedDict[Path, int] = OrderedDict()
        self._held: Counter[Path] = Counter()
        self._lock = threading.RLock()

    def get_descriptor(self, file: Path) -> int:
        """Return the descriptor of ``file``; valid until the next call."""
        with self._lock:
            if file in self._descriptors:
                self._descriptors.move_to_end(file)
                return self._descriptors[file]
            idle = [path for path in self._descriptors if not self._held[path]]
            if len(self._descriptors) >= self._limit and idle:
                os.close(self._descriptors.pop(idle[0]))
            self._descriptors[file] = os.open(file, self._flags | os.O_CLOEXEC)
            return self._descriptors[file]

    @contextmanager
    def hold_descriptor(self, file: Path) -> Iterator[int]:
        """Yield the descriptor of ``file``; no call of another thread closes it in the body."""
        with self._lock:
            descriptor = self.get_descriptor(file)
            self._held[file] += 1
        try:
            yield descriptor
        finally:
            with self._lock:
                self._held[file] -= 1

    def close(self) -> None:
        with self._lock:
            while self._descriptors:
                os.close(self._descriptors.popitem()[1])

    def __len__(self) -> int:
        return len(self._descriptors)


def read_exactly(descriptor: int, into: memoryview, offset: int, file: Path) -> None:
    """Fill ``into`` with the bytes of ``file`` from ``offset`` on.

    Raises:
        UserError: the file ends before ``into`` is full.
    """
    done = 0
    while done < len(into):
        piece = into[done : done + _MOST_BYTES_A_CALL]
        count = os.preadv(descriptor, [piece], offset + done)
        if count == 0:
            raise UserError(
                f"file {file} changed or was truncated while reading: it has no byte "
                f"{offset + done:,} any more; restore it and start again"
            )
        done += count


def read_strided(
    descriptor: int, into: memoryview, offset: int, piece: int, stride: int, file: Path
) -> None:
    """Fill ``into`` with pieces of ``piece`` bytes that begin every ``stride`` bytes of ``file``.

    The bytes in between are read too, into memory that is used again for each: a file is read in
    large consecutive parts, and nothing but the pieces is kept (data sieving, Thakur, Gropp, Lusk
    1999).

    Args:
        into: of a whole number of pieces.
        offset: of the first piece.

    Raises:
        UserError: the file ends before ``into`` is full.
    """
    count, skipped = len(into) // piece, memoryview(bytearray(stride - piece))
    step = min(max(1, _MOST_BYTES_A_CALL // stride), (_MOST_PIECES_A_CALL + 1) // 2)
    for first in range(0, count, step):
        last = min(first + step, count)
        parts = [skipped] * (2 * (last - first) - 1)
        parts[::2] = [into[i * piece : (i + 1) * piece] for i in range(first, last)]
        start = offset + first * stride
        if os.preadv(descriptor, parts, start) < (last - first) * stride - len(skipped):
            for index in range(first, last):  # a short read: rare, or the end of the file
                part = into[index * piece : (index + 1) * piece]
                read_exactly(descriptor, part, offset + index * stride, file)


def write_exactly(descriptor: int, data: memoryview, offset: int) -> None:
    """Write all of ``data`` at ``offset``."""
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done : done + _MOST_BYTES_A_WRITE], offset + done)


def make_temporary_name(file: Path) -> Path:
    """Return a new hidden name next to ``file``, on the same file system so that a rename is
    atomic."""
    return file.with_name(f".{file.name}.{secrets.token_hex(4)}.tmp")


def remove_temporary_files(file: Path) -> None:
    """Remove the files that ``make_temporary_name(file)`` named for processes that were killed."""
    pattern = re.compile(rf"\.{re.escape(file.name)}\.[0-9a-f]{{8}}\.tmp")
    if not file.parent.is_dir():
        return
    for path in file.parent.iterdir():
        if pattern.fullmatch(path.name):
            path.unlink(missing_ok=True)


def sync_directory(directory: Path) -> None:
    """Make the renames inside ``directory`` durable, where the file system can."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems
            raise
    finally:
        os.close(descriptor)


@contextmanager
def translate_read_errors(file: Path) -> Iterator[None]:
    """Translate the operating system's errors about ``file`` into ``UserError``."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"file {file} does not exist") from None
    except PermissionError:
        raise UserError(f"no permission to read {file}") from None
    except IsADirectoryError:
        raise UserError(f"{file} is a directory, not a file") from None


@contextmanager
def translate_write_errors(file: Path, num_bytes: int) -> Iterator[None]:
    """Translate the operating system's errors while ``num_bytes`` are written into ``UserError``.

    Other errors (a broken disk, say) are passed on unchanged.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"disk full while writing {file}: {num_bytes:,} bytes are needed in "
                f"{file.parent}; free space or choose another directory"
            ) from None
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise UserError(f"no permission to write {file}; choose another directory") from None
        if error.errno == errno.EFBIG:
            raise UserError(
                f"{file} is larger than its file system or the limit of this process (ulimit -f) "
                "allows for one file; choose another directory or raise the limit"
            ) from None
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
            raise UserError(
                f"cannot write {file}: {error.strerror} ({error.filename}); "
                "choose another directory"
            ) from None
        raise
