"""The lock of a build: taken over from the dead, kept by the living, given up on a signal."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dist_peft.core.stop_signals import StopRequested, catch_stop_signals
from dist_peft.data import build_lock
from dist_peft.data.build_lock import hold_build_lock

HOLD = """
import sys, time
from pathlib import Path
from dist_peft.data.build_lock import hold_build_lock
with hold_build_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_lock, "LEASE_SECONDS", 0.6)
    monkeypatch.setattr(build_lock, "_LOOK_SECONDS", 0.02)


def test_holder_that_works_longer_than_a_lease_keeps_it(tmp_path: Path) -> None:
    order: list[str] = []

    def wait_for_it() -> None:
        with hold_build_lock(tmp_path / "lock", lambda: order.append("beat")):
            order.append("second")

    with hold_build_lock(tmp_path / "lock"):
        thread = threading.Thread(target=wait_for_it)
        thread.start()
        time.sleep(1.5)
        order.append("first")
    thread.join(10)
    assert [word for word in order if word != "beat"] == ["first", "second"]
    assert order.count("beat") > 5
    assert not (tmp_path / "lock").exists()


@pytest.mark.e2e
def test_lock_of_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    text = path.read_text().replace("duration=30.0", "duration=0.6")
    holder.kill()
    holder.wait()
    path.write_text(text)
    start = time.monotonic()
    with hold_build_lock(path):
        assert time.monotonic() - start < 25
    # of another host: no process can be looked for, so the lease has to end
    path.write_text("".join(f"{s}\n" for s in text.splitlines()).replace("host=", "host=not-"))
    start = time.monotonic()
    with hold_build_lock(path):
        assert 0.5 < time.monotonic() - start < 25


def test_file_of_a_process_killed_while_it_made_it(tmp_path: Path) -> None:
    (tmp_path / "lock").touch()
    with hold_build_lock(tmp_path / "lock"):
        assert (tmp_path / "lock").read_text()


def test_signal_ends_the_wait(tmp_path: Path) -> None:
    def wait_for_it() -> None:
        with hold_build_lock(tmp_path / "lock", lambda: os.kill(os.getpid(), signal.SIGUSR1)):
            raise AssertionError("it is held")

    with hold_build_lock(tmp_path / "lock"), catch_stop_signals(), pytest.raises(StopRequested):
        wait_for_it()


def test_directory_that_cannot_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    with hold_build_lock(tmp_path / "file" / "lock"):
        assert "no lock" in caplog.text
