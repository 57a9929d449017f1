"""dist-peft init: files that pass validate and start a run; refusals leave nothing behind."""

from pathlib import Path
from typing import Any

import pytest

from dist_peft.app.cli import main
from dist_peft.core.config.io import load_config
from tests.support.command_line import lines
from tests.support.tiny_runs import save_base, save_records


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("DIST_PEFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))  # no SLURM
    monkeypatch.chdir(tmp_path)
    save_base(tmp_path / "base")
    save_records(tmp_path / "train.jsonl", 40)
    return ["init", "--base", "base", "--data", "train.jsonl"]


def test_written_files_pass_validate(
    command: list[str], capsys: pytest.CaptureFixture[Any], tmp_path: Path
) -> None:
    printed = lines([*command, "--gpus", "1", "--slurm", "--gpu-memory", "24GiB"], capsys)
    assert "wrote run.yaml, run.sbatch" in printed and "24.00 GiB: fits" in printed
    assert "start    sbatch run.sbatch" in printed
    assert "ready to train" in lines(["validate", "--config", "run.yaml", "--no-plan"], capsys)
    config = load_config("run.yaml")
    assert config.data.val_split == 0.05 and config.adapter.kind == "lora"
    text = (tmp_path / "run.yaml").read_text()
    assert sum(line.lstrip().startswith("#") or "  # " in line for line in text.splitlines()) > 15
    assert str(tmp_path / "run.yaml") in (tmp_path / "run.sbatch").read_text()
    assert "run.yaml exists" in lines(command, capsys, 2)
    small = ["--overwrite", "--k8s", "--gpu-memory", "40MiB"]
    assert main([*command, *small]) == 3
    assert "DOES NOT FIT" in capsys.readouterr().out
    assert (tmp_path / "run.k8s.yaml").is_file()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--data", ""], "--data is missing"),
        (["--gpus", "0"], "--gpus 0 is too small"),
        (["--seq-len", "3"], "--seq-len 3 is too small"),
        (["--out", "run.txt"], "ends in .yaml"),
        (["--out", "no/run.yaml"], "there is no directory"),
        (["--column", "prompt"], "of the form ROLE=NAME"),
        (["--column", "promt=prompt"], "did you mean prompt?"),
        (["--slurm", "--partition", "x"], "sinfo does not show it"),
        (["--base", "nowhere"], "nowhere does not exist"),
        (["--eval", "nowhere.jsonl"], "nowhere.jsonl does not exist"),
    ],
)
def test_refusals_write_nothing(
    command: list[str],
    args: list[str],
    words: str,
    capsys: pytest.CaptureFixture[Any],
    tmp_path: Path,
) -> None:
    assert words in lines([*command, *args], capsys, 2)
    names = {path.name for path in tmp_path.iterdir()}
    assert names <= {"base", "train.jsonl", "cache"}
