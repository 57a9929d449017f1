import signal
import subprocess
import threading
import time

import pytest

from dist_peft.export.time_limit import VerificationSkipped, enforce_time_limit


def test_work_within_the_limit() -> None:
    before = signal.getsignal(signal.SIGALRM)
    with enforce_time_limit("it", 60):
        pass
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
    assert signal.getsignal(signal.SIGALRM) == before


@enforce_time_limit("compiling", 0.2)
def wait_for_a_process(swallows: bool) -> None:
    try:
        subprocess.run(["sleep", "20"], check=True)
    except Exception:
        if not swallows:
            raise


@pytest.mark.parametrize("swallows", [False, True])
def test_time_that_is_up(swallows: bool) -> None:
    """Libraries that catch every ``Exception`` do not catch it; a process is waited for no more."""
    start = time.monotonic()
    with pytest.raises(
        VerificationSkipped, match=r"compiling took longer than 0\.00333333 minutes.*--ver"
    ):
        wait_for_a_process(swallows)
    assert time.monotonic() - start < 10
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_errors_pass() -> None:
    with pytest.raises(KeyError), enforce_time_limit("it", 60):
        raise KeyError
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_no_limit_in_another_thread() -> None:
    done = []

    def work() -> None:
        with enforce_time_limit("it", 1e-3):
            done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done
