"""A bound on what a chat template may cost, found out in a process of its own.

Jinja's sandbox bounds a single ``range``, but neither loops inside loops nor ``'x' * 10**10``, and
no exception stops a process inside one large allocation. The first rendering by each template is
therefore done in a forked process whose processor time and memory the kernel limits.
"""

import os
import resource
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path

__all__ = ["find_excess"]

_CPU_SECONDS = 5  # a conversation takes about a millisecond
_MEMORY = 2 << 30  # bytes beyond what the process has mapped already
_WALL_SECONDS = 120.0
_OUT_OF_MEMORY = 3


def find_excess(action: Callable[[], object]) -> str | None:
    """What ``action`` needs more of than is allowed; None: it ends within the bounds.

    It runs in a forked process, so that it changes nothing here; whatever else it raises is not
    looked at. A process that is kept waiting without using its time decides nothing.
    """
    with warnings.catch_warnings():
        # threads do not matter: the child renders and leaves by _exit
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        _run_bounded(action)
    deadline = time.monotonic() + _WALL_SECONDS
    pause = 0.0005
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None
        time.sleep(pause)
        pause = min(2 * pause, 0.05)
    code = os.waitstatus_to_exitcode(status)
    if code in (-signal.SIGXCPU, -signal.SIGKILL):
        return f"it does not end within {_CPU_SECONDS} seconds"
    if code == _OUT_OF_MEMORY:
        return f"it needs more than {_MEMORY >> 30} GiB of memory"
    return None


def _run_bounded(action: Callable[[], object]) -> None:
    """Run ``action`` under limits and leave the process."""
    code = 0
    try:
        signal.signal(signal.SIGXCPU, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (_CPU_SECONDS, _CPU_SECONDS + 1))
        statm = Path("/proc/self/statm")
        if statm.exists():
            mapped = int(statm.read_text().split()[0]) * resource.getpagesize()
            hard = resource.getrlimit(resource.RLIMIT_AS)[1]
            if hard == resource.RLIM_INFINITY or mapped + _MEMORY < hard:
                resource.setrlimit(resource.RLIMIT_AS, (mapped + _MEMORY, hard))
        action()
    except MemoryError:
        code = _OUT_OF_MEMORY
    except BaseException:
        code = 0
    finally:
        os._exit(code)
