"""The rule of the unit tier holds for a test whoever starts the process."""

import pytest

from tests.support import tiers

pytest_plugins = ["pytester"]

CONFTEST = """
from tests.support.tiers import *

def pytest_configure(config):
    config.addinivalue_line("markers", "e2e: whole runs")
"""
TESTS = """
import os, subprocess, sys
import pytest
from tests.support import dist

def start():
    subprocess.run([sys.executable, "-S", "-c", ""], check=True)

@pytest.fixture(scope="module")
def made():
    start()

def test_starts_python(): start()

def test_needs_what_starts_python(made): pass

def test_forks(monkeypatch):
    monkeypatch.delattr(dist, "make_process_context")  # a server of forks takes seconds to start
    with pytest.raises(NameError):
        dist.run_ranks(os.getpid, 2)

@pytest.mark.e2e
def test_marked(): start()

def test_small_program(): subprocess.run(["true"], check=True)

def test_fails(): assert False

def test_counts(): sum(range(10**6))
"""


def test_unit_tests_that_start_processes_fail(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiers, "MOST_SECONDS", 0.005)
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(TESTS)
    before = tiers._watch
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider")
    assert tiers._watch is before is not None
    tiers._watch.started.clear()  # those of the inner tests are none of this one
    result.assert_outcomes(failed=4, passed=3)
    failed = {report.nodeid.split("::")[1] for report in result.reprec.getfailures()}
    assert failed == {
        "test_starts_python",
        "test_needs_what_starts_python",
        "test_forks",
        "test_fails",
    }
    result.stdout.fnmatch_lines(["*a unit test started python*: mark it dist, e2e or launcher*"])
    result.stdout.fnmatch_lines(["*unit tests above 0.005 CPU seconds*", "*::test_counts"])
