"""A file system of a few MiB that is really full: a tmpfs, which needs root to be mounted."""

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

__all__ = ["BALLAST", "explain_no_disk", "fill_disk", "mount_small_disk"]

BALLAST = "ballast"
"""Name of the file that fills a disk."""


@contextmanager
def mount_small_disk(place: Path, num_bytes: int = 16 * 2**20) -> Iterator[None]:
    """Mount an empty file system on directory ``place`` until the end of the body."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "small-disk", str(place)]
    subprocess.run(mount, check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True, capture_output=True)


@cache
def explain_no_disk() -> str | None:
    """Return why no file system can be mounted here; None if it can."""
    with tempfile.TemporaryDirectory() as directory:
        try:
            with mount_small_disk(Path(directory)):
                return None
        except (OSError, subprocess.CalledProcessError) as error:
            text = getattr(error, "stderr", b"") or str(error).encode()
            return f"cannot mount a tmpfs (needs root): {text.decode().strip()}"


def fill_disk(directory: Path, spare: int = 0) -> None:
    """Write a file that leaves ``spare`` bytes on the file system of ``directory``."""
    descriptor = os.open(directory / BALLAST, os.O_WRONLY | os.O_CREAT)
    with suppress(OSError):
        offset = 0
        while True:
            space = os.statvfs(directory)
            free = space.f_bavail * space.f_bsize - spare
            if free <= 0:
                break
            os.posix_fallocate(descriptor, offset, free)
            offset += free
    os.close(descriptor)
