"""On Windows: one message and exit code 2, before any import that fails there."""

import subprocess
import sys
from pathlib import Path

import pytest

import dist_peft
from dist_peft.app.platform_check import find_platform_obstacle, refuse_unsupported_platform

ROOT = Path(__file__).parents[2]

WINDOWS = """
import os, signal, sys
sys.platform = "win32"
del signal.SIGUSR1, signal.SIGHUP, os.pread  # as there
sys.modules["fcntl"] = sys.modules["resource"] = None
sys.argv[1:] = ["train", "--config", "run.yaml"]
"""


@pytest.mark.parametrize("platform", ["win32", "cygwin"])
def test_windows_is_refused_with_a_remedy(
    platform: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    with pytest.raises(SystemExit) as ended:
        refuse_unsupported_platform()
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("dist-peft: Windows is not supported") and "wsl --install" in line


def test_other_platforms_are_not() -> None:
    assert [find_platform_obstacle(name) for name in ("linux", "darwin")] == [None, None]
    refuse_unsupported_platform()


@pytest.mark.e2e
@pytest.mark.parametrize(
    "entry",
    [
        "from dist_peft.app.entry_point import main",
        "import runpy; runpy.run_module('dist_peft', run_name='__main__')",
        f"import runpy; runpy.run_path({str(ROOT / 'launch' / 'train.py')!r})",
    ],
    ids=["console script", "python -m", "launch/train.py"],
)
def test_every_entry_is_checked_first(entry: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WINDOWS + entry],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and not done.stdout
    (line,) = done.stderr.splitlines()
    assert "Windows is not supported" in line


def test_import_of_the_python_api_says_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(ImportError, match="Windows is not supported"):
        _ = dist_peft.load
