"""CPU time and memory limits of a chat template, checked in a forked process.

Jinja's sandbox bounds a single ``range``, but neither nested loops nor ``'x' * 10**10``, and no
exception stops a process inside one large allocation. The first rendering by each template is
therefore tried in a forked process whose CPU time and memory the kernel limits.
"""

import os
import resource
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path

__all__ = ["find_resource_excess"]

_CPU_SECONDS = 5  # a conversation takes about a millisecond
_MEMORY = 2 << 30  # bytes in addition to the memory that the process has mapped already
_WALL_SECONDS = 120.0
_OUT_OF_MEMORY = 3


def find_resource_excess(
    action: Callable[[], object], cpu_seconds: int | None = None
) -> str | None:
    """Return the limit that ``action`` exceeds, as text; None if it ends within the limits.

    ``action`` runs in a forked process, so it has no effect here; other exceptions of it are
    ignored. A process that is starved of CPU time until the timeout counts as within the limits.

    Args:
        action: any function of this process's state.
        cpu_seconds: the limit of CPU time; five seconds without it.
    """
    cpu_seconds = cpu_seconds or _CPU_SECONDS
    with warnings.catch_warnings():
        # forking with threads is safe here: the child only renders and calls _exit
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        _run_bounded(action, cpu_seconds)
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
        return f"it does not end within {cpu_seconds} seconds"
    if code == _OUT_OF_MEMORY:
        return f"it needs more than {_MEMORY >> 30} GiB of memory"
    return None


def _run_bounded(action: Callable[[], object], cpu_seconds: int) -> None:
    """Run ``action`` under limits and exit the process."""
    code = 0
    try:
        signal.signal(signal.SIGXCPU, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds + 1))
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
