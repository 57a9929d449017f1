"""Identify the machine within which a process id means one process."""

import os
import socket
from contextlib import suppress
from pathlib import Path

__all__ = ["identify_machine"]


def identify_machine() -> str:
    """Return an identifier of this boot of this host and of the process namespace.

    Containers may share a host name, and hosts may share a file system with files that name a
    process: only where this text is equal can the process be looked for.
    """
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with suppress(OSError):
        parts.append(str(os.stat("/proc/self/ns/pid").st_ino))
    return " ".join(parts)
