"""How long fuzz tests run, and the limits under which each input is tried.

Each test tries ``EXAMPLES`` inputs. With ``DIST_PEFT_FUZZ_MINUTES`` set, it tries others
for so many minutes: 60 minutes over all tests are an hour by command.
"""

import functools
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings

from dist_peft.core.errors import UserError

EXAMPLES = 30
MEMORY_BYTES = 1 << 30
CPU_SECONDS = 5

FUZZ = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))


class DidNotEnd(Exception):
    """An input took more than ``CPU_SECONDS``."""


def fuzz(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test of hypothesis under ``FUZZ``, again and again while there are minutes left."""
    given = FUZZ(test)

    @functools.wraps(given)
    def run(*args: Any, **kwargs: Any) -> None:
        end = time.monotonic() + 60 * float(os.environ.get("DIST_PEFT_FUZZ_MINUTES", "0"))
        given(*args, **kwargs)
        while time.monotonic() < end:
            given(*args, **kwargs)

    return run


@contextmanager
def limits() -> Iterator[None]:
    """Let what runs here fail where it allocates absurdly much, or does not end."""
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGVTALRM, _raise_did_not_end)
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY_BYTES, before[1]))
    signal.setitimer(signal.ITIMER_VIRTUAL, CPU_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.signal(signal.SIGVTALRM, handler)


def try_input(action: Callable[[], Any]) -> tuple[Any, str | None]:
    """Call ``action`` under ``limits``; return what it returned, and the message of a refusal."""
    with limits():
        try:
            return action(), None
        except UserError as error:
            return None, str(error)


def _raise_did_not_end(number: int, frame: Any) -> None:
    raise DidNotEnd(f"more than {CPU_SECONDS} seconds")
