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
