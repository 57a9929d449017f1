import argparse
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

from dist_peft.app import cli
from dist_peft.app.commands import quickstart
from dist_peft.app.quickstart_run import check_earlier_results
from dist_peft.core.config.io import load_config
from dist_peft.core.errors import UserError
from dist_peft.core.world import World
from dist_peft.train.step_metrics import read_metrics
from tests.support.transcripts import TRANSCRIPTS, find_missing_line, read_commands

ROOT = Path(__file__).parents[3]
SMALL = ("--pretrain-steps", "20", "--steps", "6")


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


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory, forked_python: str) -> tuple[Path, str]:
    """The directory in which a small quickstart ran, and all that it printed, without the line of
    DeepSpeed that transformers imports where it is installed."""
    directory = tmp_path_factory.mktemp("quickstart")
    command = [sys.executable, "-m", "dist_peft", "quickstart", *SMALL]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    environment["PYTHON_EXEC"] = forked_python  # of torchrun's ranks
    done = subprocess.run(
        command,
        cwd=directory,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    lines = done.stdout.splitlines(keepends=True)
    return directory, "".join(line for line in lines if "real_accelerator" not in line)


@pytest.mark.main_job
@pytest.mark.e2e
@pytest.mark.dist
def test_whole_job(printed: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    directory, text = printed
    monkeypatch.chdir(directory)
    tmp_path = Path("runs/quickstart")
    assert "step 12 of 20, loss " in text
    assert "0.00% of the change by training" in text and "warning: " not in text
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert len(records) == 6
    before, after = records[0].eval_loss_before, records[-1].eval_loss
    assert before is not None and after is not None and after < before
    assert f"{before:.3f} before, {after:.3f} after" in text
    assert load_config(tmp_path / "run" / "config.yaml").train.steps == 6
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    report = (tmp_path / "run" / "report.html").read_text()
    assert "Samples" in report and "Merged into" in report
    assert "cards with the right kind and arguments: 0 before, " in text
    versions = json.loads((tmp_path / "run" / "report.json").read_text())
    assert transformers.__version__ in json.dumps(versions)
    check_earlier_results(tmp_path)  # the next quickstart may replace them


@pytest.mark.main_job
@pytest.mark.e2e
@pytest.mark.dist
def test_the_transcript_prints_its_lines(
    printed: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    directory, text = printed
    monkeypatch.chdir(directory)
    page = (TRANSCRIPTS / "quickstart.md").read_text()
    (install,) = re.findall(r"^python3 -m venv .*$", page, re.MULTILINE)
    assert install in (ROOT / "README.md").read_text()
    first, *others = read_commands(page)
    assert first.command == "dist-peft quickstart"
    assert find_missing_line(first, text) is None, text
    for shown in others:
        program, *arguments = shlex.split(shown.command)
        if program == "dist-peft":
            assert cli.main(arguments) == 0
        else:
            subprocess.run([program, *arguments], check=True)
        output = capfd.readouterr().out
        assert find_missing_line(shown, output) is None, output
    assert [shown.command.split()[:2] for shown in others] == [
        ["ls", "runs/quickstart"],
        ["dist-peft", "inspect"],
        ["dist-peft", "chat"],
    ]
    assert output.strip()  # an answer
