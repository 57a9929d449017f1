"""``export --format peft`` of initializations that PEFT's form cannot keep on a quantized base."""

from pathlib import Path

import pytest

from dist_peft.app import cli
from dist_peft.app.commands.train import train_from_config
from dist_peft.core.config.io import parse_config
from dist_peft.core.log import close_log
from dist_peft.core.world import World
from tests.support.tiny_runs import tiny_tree


@pytest.mark.parametrize("quant", [None, {"kind": "nf4"}], ids=str)
def test_pissa(
    quant: dict[str, str] | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = {"r": 4, "alpha": 8, "init": "pissa"}
    tree = tiny_tree(tmp_path, base__quant=quant, adapter=adapter)
    assert train_from_config(parse_config(tree), World()) == 0
    close_log()
    run, out = tmp_path / "run", tmp_path / "out"
    argv = ["export", "--format", "peft", "--run", str(run), "--out"]
    code = cli.main([*argv, str(out)])
    err = capsys.readouterr().err
    assert code == (quant is not None)
    assert ("which no quantized base of PEFT is" in err) == (quant is not None)
    assert "loaded by peft" in err
    assert cli.main([*argv, str(tmp_path / "other"), "--max-error", "100"]) == 0
    close_log()
