"""The last line of a command, which only one of two threads may print.

The main thread ends a command that fails, the watch thread one that stands still. Both may find out
at once: a rank that was frozen continues, its watch thread sees that the others have left, and its
main thread that their connections are closed. The first to claim the line prints it and ends the
process; nothing that the other would print comes after it.
"""

import threading

__all__ = ["claim_last_line", "reset_last_line", "wait_for_exit"]

_lock = threading.Lock()
_owner: int | None = None


def reset_last_line() -> None:
    """Begin a command: no thread has claimed its last line."""
    global _owner
    _owner = None


def claim_last_line() -> bool:
    """Return whether the calling thread is to print the last line and end the process."""
    global _owner
    with _lock:
        if _owner is None:
            _owner = threading.get_ident()
        return _owner == threading.get_ident()


def wait_for_exit() -> None:
    """Wait, in a thread that has come too late, until the other one ends the process."""
    threading.Event().wait()
