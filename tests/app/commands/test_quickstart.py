import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dist_peft.app.commands import quickstart
from dist_peft.app.quickstart_run import check_earlier_results
from dist_peft.core.config.io import load_config
from dist_peft.core.errors import UserError
from dist_peft.core.world import World
from dist_peft.train.step_metrics import read_metrics


def parse(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    quickstart.add_arguments(parser)
    return parser.parse_args(argv)


def test_arguments() -> None:
    args = parse()
    assert (args.base, args.out, args.ranks) == (None, Path("runs/quickstart"), 2)
    args = parse("--base", "a/b", "--steps", "7", "--ranks", "1", "--pretrain-steps", "25")
    assert (args.base, args.steps, args.ranks, args.pretrain_steps) == ("a/b", 7, 1, 25)


@pytest.mark.parametrize("option", ["--ranks", "--steps", "--pretrain-steps"])
def test_counts_below_one_are_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse(option, "0")
    assert f"argument {option}: 0 is less than 1" in capsys.readouterr().err


def test_missing_base_is_told_before_anything_is_made(tmp_path: Path) -> None:
    args = parse("--base", "/nowhere", "--out", str(tmp_path / "out"))
    with pytest.raises(UserError, match=r"base\.path /nowhere does not exist"):
        quickstart.run(args, World())
    assert not (tmp_path / "out").exists()


@pytest.mark.e2e
@pytest.mark.dist
def test_whole_job(tmp_path: Path, forked_python: str) -> None:
    root = Path(__file__).parents[3]
    command = [sys.executable, "-m", "dist_peft", "quickstart", "--out", str(tmp_path)]
    command += ["--pretrain-steps", "20", "--steps", "6"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    environment["PYTHON_EXEC"] = forked_python  # of torchrun's ranks
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 12 of 20, loss " in done.stdout
    assert "held-out loss: " in done.stdout and "fine-tuned: " not in done.stderr
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert len(records) == 6
    before, after = records[0].eval_loss_before, records[-1].eval_loss
    assert before is not None and after is not None and after < before
    assert f"{before:.3f} before, {after:.3f} after" in done.stdout
    assert load_config(tmp_path / "run" / "config.yaml").train.steps == 6
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    report = (tmp_path / "run" / "report.html").read_text()
    assert "Samples" in report and "Merged into" in report
    assert "cards with the right kind and arguments: 0 before, " in done.stdout
    check_earlier_results(tmp_path)  # the next quickstart may replace them
