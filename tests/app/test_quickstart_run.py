"""The parts of the quickstart; the whole of it: ``commands/test_quickstart``."""

import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from dist_peft.app.quickstart_run import build_quickstart_config, launch_training
from dist_peft.core.errors import UserError


def test_configuration(tmp_path: Path) -> None:
    files = tmp_path / "train.jsonl", tmp_path / "held_out.jsonl"
    config = build_quickstart_config("a/b", *files, tmp_path / "run", steps=7)
    assert config.base.path == "a/b" and config.base.quant is not None
    assert config.base.quant.kind == "nf4"
    assert [s.path for s in config.data.train + config.data.eval] == [str(f) for f in files]
    assert config.train.steps == 7 and config.save.dir == str(tmp_path / "run")


@pytest.mark.parametrize("ranks", [1, 3])
def test_training_is_launched_as_a_user_would(
    ranks: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    done = subprocess.CompletedProcess([], 2)
    with (
        mock.patch.object(subprocess, "run", return_value=done) as run,
        pytest.raises(UserError, match="training ended with exit code 2"),
    ):
        launch_training(tmp_path / "q.yaml", ranks, tmp_path / "run")
    (command,) = run.call_args.args
    assert command[0] == sys.executable
    assert command[-5:] == ["-m", "dist_peft", "train", "--config", str(tmp_path / "q.yaml")]
    assert ("--nproc_per_node=3" in command) == (ranks == 3)
    assert " ".join(command[1:]) in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
