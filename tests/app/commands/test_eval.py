"""``dist-peft eval`` refuses before it loads."""

from pathlib import Path

import pytest

from dist_peft.app import cli
from dist_peft.core.log import close_log
from tests.support.tiny_runs import save_config, tiny_tree


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(save_config(tmp_path, tiny_tree(tmp_path)))
    assert cli.main(["eval", "--config", config, "--run", str(tmp_path / "none")]) == 2
    assert "has no complete checkpoint" in capsys.readouterr().err
    assert cli.main(["eval", "--config", config, "data.eval=[]"]) == 2
    assert "data.eval is empty" in capsys.readouterr().err
    close_log()


def test_the_configuration_of_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    for argv, message in (
        ([], "give --run DIR to evaluate a run, or --config FILE"),
        (["--run", str(run)], f"{run} is no run directory: it has no config.yaml"),
    ):
        assert cli.main(["eval", *argv]) == 2
        assert message in capsys.readouterr().err
    run.mkdir()
    save_config(tmp_path, tiny_tree(tmp_path)).rename(run / "config.yaml")
    assert cli.main(["eval", "--run", str(run)]) == 2
    assert "has no complete checkpoint" in capsys.readouterr().err
    assert cli.main(["eval", "--run", str(run), "data.eval=[]"]) == 2
    assert "data.eval is empty" in capsys.readouterr().err
    with (run / "config.yaml").open("a") as file:
        file.write("resume: ${save.dir}\n")
    assert cli.main(["eval", "--run", str(run)]) == 2  # a stranger's file
    assert "${...} reference in resume" in capsys.readouterr().err
    close_log()
