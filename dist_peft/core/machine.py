"""This machine: its identity, and how many files a process may open."""

import os
import resource
import socket
from contextlib import suppress
from pathlib import Path

__all__ = ["identify_machine", "raise_open_file_limit"]


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


def raise_open_file_limit() -> int:
    """Raise the limit of open descriptors of this process as far as it may be, and return it.

    Shells start programs with 1024. Of N ranks the first serves two connections each, and each has
    N - 1 sockets for every gloo group: 512 ranks need more.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # macOS reports more than it grants
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        return hard
    return soft
