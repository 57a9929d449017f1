"""The unit tier: tests that look at one piece in the test's own process, within a few seconds.

A test that starts ranks is marked ``dist``; one that starts another Python process, is about whole
runs or data sets, or takes more than ``MOST_SECONDS`` of CPU time, ``e2e``; one that starts a real
launcher, ``launcher``. A test without these marks that starts such a process fails; what takes
longer is listed at the end of a run, since the time depends on the machine.

``tests/conftest.py`` imports the hooks.
"""

import inspect
import os
import re
import subprocess
from collections.abc import Generator
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import pytest

__all__ = [
    "MOST_SECONDS",
    "note_process",
    "pytest_runtest_makereport",
    "pytest_runtest_protocol",
    "pytest_terminal_summary",
]

MOST_SECONDS = 3.0
"""CPU time of a unit test and of the fixtures it is the first to need, before it is listed."""

OTHER_TIERS = ("dist", "e2e", "launcher")
_SECONDS = "cpu_seconds_of_unit_test"
_STARTED = re.compile(r"python[\d.]*|torchrun|deepspeed|srun|mpirun|mpiexec")


@dataclass
class _Watch:
    """A test that runs, and the processes that it started."""

    is_unit: bool
    begin: float
    started: list[str] = field(default_factory=list)


_watch: _Watch | None = None


def note_process(name: str) -> None:
    """Record that the present test starts a process that the unit tier must not start."""
    if _watch is not None:
        _watch.started.append(name)


def _watch_subprocesses() -> None:
    """Each ``Popen`` names its program. An audit hook would be called for every event of the
    interpreter (imports, frames, attributes)."""
    start = subprocess.Popen.__init__
    signature = inspect.signature(start)

    @wraps(start)
    def watched_start(*arguments: Any, **settings: Any) -> None:
        given = signature.bind(*arguments, **settings).arguments
        program = given.get("executable") or given["args"]
        if not isinstance(program, (str, bytes, os.PathLike)):
            program = next(iter(program), "")
        name = os.path.basename(os.fsdecode(program))
        if not given.get("shell") and _STARTED.fullmatch(name):
            note_process(name)
        start(*arguments, **settings)

    subprocess.Popen.__init__ = watched_start  # type: ignore[method-assign]


_watch_subprocesses()


def _read_cpu_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    global _watch
    before = _watch
    is_unit = not any(item.get_closest_marker(name) for name in OTHER_TIERS)
    _watch = _Watch(is_unit, _read_cpu_seconds())
    try:
        return (yield)
    finally:
        _watch = before


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if _watch is not None and _watch.is_unit and report.when == "call":
        report.user_properties.append((_SECONDS, _read_cpu_seconds() - _watch.begin))
        if _watch.started and report.passed:
            report.outcome = "failed"
            report.longrepr = (
                f"a unit test started {', '.join(_watch.started)}: mark it dist, e2e or launcher"
            )
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    slow = [
        (seconds, report.nodeid)
        for report in terminalreporter.getreports("passed")
        for name, seconds in report.user_properties
        if name == _SECONDS and seconds > MOST_SECONDS
    ]
    if slow:
        terminalreporter.section(f"unit tests above {MOST_SECONDS:g} CPU seconds")
        for seconds, name in sorted(slow, reverse=True):
            terminalreporter.line(f"{seconds:.1f} s  {name}")
