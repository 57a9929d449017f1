"""The executable that launchers' tests use in place of ``python`` behaves as ``python`` does."""

import os
import signal
import socket
import struct
import subprocess
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from tests.support.cluster import wait_until
from tests.support.forked_python import _pass_signals_on, _report_end, _Script

pytestmark = pytest.mark.dist

SCRIPT = """
import os, signal, sys, time
from pathlib import Path
assert __name__ == "__main__"
print(sys.argv[1:], os.getcwd(), os.environ["WORD"], sys.stdin.read(), flush=True)
print("error", file=sys.stderr)
if "wait" in sys.argv:
    signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
    Path("process").write_text(str(os.getpid()))
    time.sleep(60)
sys.exit(int(sys.argv[-1]))
"""


@pytest.fixture
def script(tmp_path: Path) -> str:
    (tmp_path / "script.py").write_text(SCRIPT)
    return str(tmp_path / "script.py")


def test_same_outcome_as_python(forked_python: str, script: str, tmp_path: Path) -> None:
    def run(program: str) -> tuple[int, str, str]:
        done = subprocess.run(
            [program, "-u", script, "--config", "a b", "3"],
            input="typed",
            env={"WORD": "ü", "PATH": os.environ["PATH"]},
            capture_output=True,
            text=True,
            cwd=tmp_path,
            check=False,
        )
        return done.returncode, done.stdout, done.stderr

    found = run(forked_python)
    assert found == run(sys.executable)
    assert found[0] == 3 and found[1].startswith("['--config', 'a b', '3']")


@pytest.mark.parametrize("end", [signal.SIGUSR1, signal.SIGTERM, signal.SIGKILL])
def test_signals_reach_the_script(
    forked_python: str, script: str, tmp_path: Path, end: signal.Signals
) -> None:
    """One that it handles, one that ends it, and the end of whoever waits for it."""
    process = subprocess.Popen(
        [forked_python, script, "wait"],
        env={**os.environ, "WORD": "w"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=tmp_path,
    )
    note = tmp_path / "process"
    wait_until(lambda: note.exists() and note.read_text(), 90, "the script")
    forked = Path("/proc", note.read_text())
    assert forked.name != str(process.pid)
    process.send_signal(end)
    assert process.wait(timeout=90) == (75 if end == signal.SIGUSR1 else -end)
    wait_until(lambda: not forked.exists(), 90, "end of the script")


@pytest.mark.parametrize("sent", [b"", b"\0\0", struct.pack("!I", 40) + b"{"])
def test_a_client_killed_while_it_asks_stops_no_other(
    forked_python: str, script: str, tmp_path: Path, sent: bytes
) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(Path(forked_python).parent / "socket"))
        if sent:
            socket.send_fds(client, [b"x"], [0, 1, 2])
            client.sendall(sent)
    done = subprocess.run(
        [forked_python, script, "3"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env={**os.environ, "WORD": "w"},
        cwd=tmp_path,
        timeout=60,
        check=False,
    )
    assert done.returncode == 3


def test_a_signal_may_come_after_the_end_of_the_script() -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    here, there = socket.socketpair()
    process = SimpleNamespace(pid=ended.pid, join=lambda: None, exitcode=0)
    waiting = _Script(here, cast(BaseProcess, process))
    there.sendall(bytes([signal.SIGTERM]))
    _pass_signals_on(waiting)
    there.close()
    _report_end(waiting)
    assert here.fileno() == -1
