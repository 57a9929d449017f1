"""The scripts for a machine with a GPU, at tiny sizes on the CPU."""

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

GPU = Path(__file__).parent.parent / "benchmarks" / "gpu"


def run_script(monkeypatch: pytest.MonkeyPatch, out: Path, name: str, *arguments: str) -> Any:
    """Run a script in this process; return the result that it wrote last."""
    monkeypatch.setattr(sys, "path", [str(GPU), str(GPU.parent), *sys.path])
    monkeypatch.setattr(sys, "argv", [name, "--dry-run", "--out", str(out), *arguments])
    importlib.import_module(name).main()
    newest = max(out.glob("*.json"), key=lambda file: file.stat().st_mtime_ns)
    result = json.loads(newest.read_text())["result"]
    assert result["failures"] == [] and result["dry_run"]
    return result


def test_shell_script_names_its_steps() -> None:
    script = GPU / "first_half_hour.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    done = subprocess.run([str(script), "--unknown"], capture_output=True, text=True)
    assert done.returncode == 2 and "--dry-run" in done.stdout
    text = script.read_text()
    steps = text.partition("# Steps: ")[2].partition(". Each")[0].replace("#", "").split()
    assert len(steps) == 10
    for name in steps:
        assert f"step {name} " in text or f"shape {name} " in text


@pytest.mark.e2e
def test_steps_of_a_tiny_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("environment", "decode_bits"):
        run_script(monkeypatch, tmp_path, name)
    result = run_script(monkeypatch, tmp_path, "shape_step", "--sides", "nf4")
    own = result["sides"]["nf4"]
    assert len(own["losses"]) == 4 and own["tokens_per_s"] > 0
    assert abs(own["losses"][0] - math.log(1000)) < 0.5  # random weights
    assert own["plan"]["total"] > own["plan"]["allocated"] > 0
