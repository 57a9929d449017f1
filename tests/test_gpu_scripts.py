"""The scripts for a machine with a GPU, at tiny sizes on the CPU."""

import importlib
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_peft.core.world import World
from tests.support.dist import run_ranks

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
    assert len(steps) == 11
    for name in steps:
        assert f"step {name} " in text or f"shape {name} " in text


STUB = """#!/usr/bin/env bash
echo "$*" >> "$CALLS"
case "$*" in
  *environment.py*) name=environment ;;
  *collectives.py*) exit 0 ;;  # and no result
  *decode_bits.py*) exit 3 ;;
  *decode_roofline.py*) name=roofline ;;
  *kill_rank.py*) name=kill-rank ;;
  *shape_step.py*) base=$3; name=shape-${base##*-} ;;
  *) exit 0 ;;
esac
echo '{}' > "$OUT/$name.json"
"""


def test_shell_script_counts_failures(tmp_path: Path) -> None:
    """A step that fails, or leaves no result, is counted and stops no other."""
    out, python, calls = tmp_path / "out", tmp_path / "stub", tmp_path / "calls"
    out.mkdir()
    python.write_text(STUB)
    python.chmod(0o755)
    (out / "decode.json").write_text("of an earlier run")

    def run_all(*only: str) -> tuple[int, dict[str, str], list[str]]:
        calls.write_text("")
        done = subprocess.run(
            [str(GPU / "first_half_hour.sh"), "--dry-run", "--out", str(out), *only],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHON": str(python), "CALLS": str(calls), "OUT": str(out)},
        )
        assert not done.stderr
        lines = (line.split(maxsplit=1) for line in done.stdout.splitlines())
        return done.returncode, dict(lines), calls.read_text().splitlines()

    code, lines, called = run_all()
    assert code == 2 and len(lines) == 11
    failed = {name: text for name, text in lines.items() if not text.startswith("ok ")}
    assert set(failed) == {"collectives", "decode"}
    assert failed["decode"].startswith(f"FAILED (3), see {out}/decode.log")
    assert failed["collectives"].startswith("FAILED (no result), ")
    assert not (out / "decode.json").exists() and (out / "shape-32b.json").exists()
    assert len(called) == 12 and called[-1].startswith("benchmarks/gpu/summary.py")
    assert all("--dry-run" in c or ("-m gpu -q" in c and "--collect-only" in c) for c in called)
    code, lines, called = run_all("--only", "decode", "shape-8b")
    assert code == 1 and set(lines) == {"decode", "shape-8b"} and len(called) == 3


def take_rank(world: World, scratch: str) -> dict[str, Any]:
    sys.path[:0] = [str(GPU), str(GPU.parent)]
    collectives = importlib.import_module("collectives")
    device = torch.device("cpu")
    found: dict[str, Any] = collectives.take_steps(device, world.size, world.rank, Path(scratch))
    if world.size > 1:
        found |= collectives.try_collectives(device, world.size, world.rank)
    return found


@pytest.mark.dist
def test_ranks_of_collectives(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    one = take_rank(World(), str(tmp_path))["losses"]
    for found in run_ranks(take_rank, 2, str(tmp_path)):
        assert found.pop("losses") == pytest.approx(one, rel=1e-3)
        assert len(found) == 12 and set(found.values()) == {"ok"}


@pytest.mark.e2e
def test_steps_of_a_tiny_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("environment", "decode_bits", "decode_roofline"):
        run_script(monkeypatch, tmp_path, name)
    result = run_script(monkeypatch, tmp_path, "shape_step", "--sides", "nf4")
    monkeypatch.setattr(sys, "argv", ["summary", "--dry-run", "--out", str(tmp_path)])
    importlib.import_module("summary").main()
    shown = capsys.readouterr().out
    assert re.search(r"8B, tokens/s \| +\d+\.\d \| more than 9400", shown) and "65B" in shown
    own = result["sides"]["nf4"]
    assert len(own["losses"]) == 4 and own["tokens_per_s"] > 0
    assert abs(own["losses"][0] - math.log(1000)) < 0.5  # random weights
    assert own["plan"]["total"] > own["plan"]["allocated"] > 0


@pytest.mark.e2e
def test_estimate_counts_the_launches_of_its_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a tiny block: launches do not depend on sizes."""
    monkeypatch.setattr(sys, "path", [str(GPU.parent), *sys.path])
    script = importlib.import_module("h100_estimate")
    config = script.LlamaConfig(
        hidden_size=96, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2
    )
    written = json.loads((GPU.parent / "results" / "h100_estimate.json").read_text())["result"]
    cases = {}
    for name in ("fused decode, composed", "fused, shared decodes", "fused, dropout"):
        counted = cases[name] = script.count_block(config, script.CASES[name])
        table = written["cases"][name]["kinds"]
        for kind in ("decode", "LoRA", "attention"):
            assert 32 * counted[kind].launches == table[kind]["launches"]
    # seven linears: forward, recomputation but for the last one's product, backward
    assert counted["decode"].launches == 7 + 6 + 7
    assert counted["LoRA"].launches == (7 + 7) + (7 + 6) + 4 * 7
    shared = cases["fused, shared decodes"]
    assert shared["decode"].launches == 7 + 6 + 1
    # projections of q, k and v, of o, of gate and up, of down; backward: three of each linear, dA
    assert shared["LoRA"].launches == (4 + 7) + (4 + 6) + (2 * 7 + 4 + 4)
