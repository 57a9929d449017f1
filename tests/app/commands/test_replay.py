"""``dist-peft replay``; the replayed steps are in ``test_step_replay.py``."""

from pathlib import Path

import pytest

from dist_peft.app import cli
from tests.support.command_line import lines
from tests.support.compared_runs import make_run


def test_runs_that_cannot_be_replayed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = ["--from", "0", "--to", "2"]
    assert "no config.yaml" in lines(["replay", "--run", str(tmp_path), *steps], capsys, 2)
    run = make_run(tmp_path / "a", 8, 2.0)
    (run / "config.yaml").write_text("base: {path: b}\ndata: {train: [d.jsonl]}\n")
    before = sorted(tmp_path.rglob("*"))
    assert "without train.exact" in lines(["replay", "--run", str(run), *steps], capsys, 2)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("left_out", ["--run", "--from", "--to"])
def test_options_that_are_needed(left_out: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"--run": "runs/a", "--from": "0", "--to": "2"}
    given = [text for name, value in options.items() if name != left_out for text in (name, value)]
    with pytest.raises(SystemExit) as ended:
        cli.main(["replay", *given])
    assert ended.value.code == 2 and left_out in capsys.readouterr().err
