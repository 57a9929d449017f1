"""What a run with PiSSA or LoftQ says at its end of its adapter directory, and what it names."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from dist_peft.app import cli
from dist_peft.app.commands.train import train_from_config as train_once
from dist_peft.app.trainer import Trainer
from dist_peft.core.config.io import parse_config
from dist_peft.core.log import close_log
from dist_peft.core.world import World
from tests.support.dist import run_ranks
from tests.support.export_runs import finished_run, fork_consumers
from tests.support.story_runs import train
from tests.support.tiny_runs import tiny_tree

pytestmark = pytest.mark.e2e

NF4 = {"kind": "nf4", "group_size": 8}


def stored(run: Path) -> dict[str, Any]:
    about = json.loads((run / "adapter" / "dist_peft.json").read_text())
    assert about["base"] and about["adapter"]["start"]  # what was there stays
    found: dict[str, Any] = about["peft_form"]
    return found


def test_named_form_is_exact(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fork_consumers(monkeypatch)
    run = finished_run(tmp_path, {"kind": "nf4"}, {"init": "loftq"})
    found, log = stored(run), (run / "log.txt").read_text()
    wanted = f"dist-peft export --run {run} --format bnb-nf4 --keep-adapter --out OUT"
    assert found["exact"] == wanted and f"Exact: {wanted}" in log
    assert found["error"] > 0.05
    assert f"{100 * found['error']:.1f} % of the change by training" in log
    assert found["linears"] == 14 and f"({found['rows']} rows of 14 linears" in log
    argv = shlex.split(wanted)[1:-1]
    assert cli.main([*argv, str(tmp_path / "out")]) == 0, capsys.readouterr().err
    close_log()


@pytest.mark.parametrize(
    ("quant", "form"),
    [
        (NF4, "dist-peft merge --run {} --base decoded --out OUT"),  # no blocks of 32
        (
            {"kind": "int", "group_size": 8},
            "dist-peft export --run {} --format gptq --out OUT",
        ),
        (
            {"kind": "int", "group_size": 8, "solver": "hqq"},
            "dist-peft merge --run {} --base decoded --out OUT",
        ),
    ],
    ids=["small groups", "int", "hqq"],
)
def test_other_bases(tmp_path: Path, quant: dict[str, Any], form: str) -> None:
    tree = tiny_tree(tmp_path, base__quant=quant, adapter={"r": 3, "init": "pissa"}, data__eval=[])
    assert train_once(parse_config(tree), World()) == 0
    close_log()
    assert stored(tmp_path / "run")["exact"] == form.format(tmp_path / "run")


@pytest.mark.dist
def test_resumed_on_three_ranks(tmp_path: Path) -> None:
    """fsdp2, odd sizes; the figure is that of one process, to which training is equal."""

    def tree(name: str, **engine: Any) -> dict[str, Any]:
        adapter = {"r": 5, "alpha": 10, "init": "pissa"}
        save = {"dir": str(tmp_path / name), "every": 0}
        settings: dict[str, Any] = {
            "base__quant": NF4,
            "adapter": adapter,
            "save": save,
            "data__eval": [],
        }
        settings["train__global_batch"] = 3
        return tiny_tree(tmp_path, **settings, engine=engine)

    assert train(World(), tree("whole")) == 0
    assert train(World(), tree("cut"), 2) == 75
    assert not (tmp_path / "cut" / "adapter").exists()
    assert run_ranks(train, 3, tree("cut", kind="fsdp2")) == [0] * 3
    whole, found = stored(tmp_path / "whole"), stored(tmp_path / "cut")
    assert found["error"] == pytest.approx(whole["error"], rel=1e-3)
    logs = [(tmp_path / "cut" / f"log.rank-{rank}.txt") for rank in (1, 2)]
    assert "Exact: " in (tmp_path / "cut" / "log.txt").read_text()
    assert not any("Exact: " in log.read_text() for log in logs if log.is_file())


def test_base_that_is_gone_does_not_fail_a_finished_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when its directory was unmounted: the adapter is written, the figure is not."""
    real = Trainer._measure_fusion_attention

    def remove_base(self: Trainer) -> Any:
        (tmp_path / "base" / "model.safetensors").unlink()
        return real(self)

    monkeypatch.setattr(Trainer, "_measure_fusion_attention", remove_base)
    tree = tiny_tree(tmp_path, base__quant=NF4, adapter={"r": 3, "init": "pissa"}, data__eval=[])
    assert train_once(parse_config(tree), World()) == 0
    close_log()
    run = tmp_path / "run"
    assert "was not measured" in (run / "log.txt").read_text()
    assert "peft_form" not in json.loads((run / "adapter" / "dist_peft.json").read_text())
    assert (run / "report.html").is_file()


def test_start_from_zero_says_nothing(tmp_path: Path) -> None:
    tree = tiny_tree(tmp_path, base__quant=NF4, data__eval=[])
    assert train_once(parse_config(tree), World()) == 0
    close_log()
    run = tmp_path / "run"
    assert "Exact: " not in (run / "log.txt").read_text()
    assert "peft_form" not in json.loads((run / "adapter" / "dist_peft.json").read_text())
