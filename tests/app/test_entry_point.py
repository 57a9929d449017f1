"""Signals are noted from the first line of every entry point."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

SLOW_TORCH = """
import os, time
assert os.environ["TORCH_CPP_LOG_LEVEL"] == "ERROR"
assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
open(os.environ["MARK"], "w").close()
time.sleep(1)
raise SystemExit("torch was imported to its end")
"""


@pytest.mark.e2e
@pytest.mark.parametrize(
    "command",
    [
        [str(ROOT / "launch" / "train.py")],
        ["-m", "dist_peft", "train"],
        ["-c", "import sys; from dist_peft.app.entry_point import main; sys.exit(main())", "train"],
    ],
    ids=["launch/train.py", "python -m", "console script"],
)
def test_signal_while_torch_is_imported(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A torch whose import takes a second stands in for a cold shared file system."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(SLOW_TORCH)
    mark = tmp_path / "mark"
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    monkeypatch.delenv("TORCH_CPP_LOG_LEVEL", raising=False)
    process = subprocess.Popen(
        [sys.executable, *command, "--config", "none.yaml"],
        env={**os.environ, "PYTHONPATH": path, "MARK": str(mark)},
        stderr=subprocess.PIPE,
        text=True,
    )
    end = time.monotonic() + 120
    while not mark.exists() and time.monotonic() < end:
        time.sleep(0.01)
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        process.send_signal(number)
    _, told = process.communicate(timeout=120)
    assert "torch was imported to its end" in told, told
    assert "stopping at the next safe point" in told
    assert process.returncode == 1  # of the stand-in, not of a signal
