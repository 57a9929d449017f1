"""Refuse a platform that the program cannot run on, before a module fails that needs another.

On Windows there are no signals ``SIGUSR1`` and ``SIGHUP``, no ``fcntl`` locks and no ``pread``, so
that the first import would end in a traceback. This module needs nothing but ``sys``.
"""

import sys

__all__ = ["find_platform_obstacle", "refuse_unsupported_platform"]


def find_platform_obstacle(platform: str) -> str | None:
    """Return why the program does not run on ``platform`` (of ``sys.platform``), and the remedy;
    None: it does."""
    if platform not in ("win32", "cygwin"):
        return None
    return (
        "Windows is not supported: ranks, file locks and stop signals are those of Linux. Use "
        "WSL 2: run 'wsl --install' once, and the same commands inside of it"
    )


def refuse_unsupported_platform() -> None:
    """Print one message and exit with code 2 where this platform is not supported.

    Raises:
        SystemExit: it is not.
    """
    if (reason := find_platform_obstacle(sys.platform)) is not None:
        print(f"dist-peft: {reason}", file=sys.stderr)
        raise SystemExit(2)
