"""The processor that this process runs on, in words."""

import platform
from collections.abc import Sequence
from pathlib import Path

__all__ = ["describe_cpu"]


def describe_cpu(keys: Sequence[str] = ("model name",)) -> str:
    """Return facts of the first processor, in one line.

    Args:
        keys: of ``/proc/cpuinfo``; those that it lacks are left out. Where nothing is found, as on
            other systems than Linux, the name that Python knows is returned.
    """
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    lines = text.partition("\n\n")[0].splitlines()
    facts = {
        key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)
    }
    named = " ".join(facts[key] for key in keys if facts.get(key))
    return named or platform.processor() or platform.machine()
