"""Several adapters on one base: a switch gives the same bits, whatever was done in between."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_peft.app import cli
from dist_peft.app.adapter_bank import AdapterBank
from dist_peft.app.tasks import list_task_runs
from dist_peft.core.log import close_log
from dist_peft.core.world import World
from dist_peft.train.evaluate import inference_mode
from dist_peft.train.step_metrics import METRICS_FILE, read_metrics
from tests.support.dist import run_ranks
from tests.support.equality import build, train_steps
from tests.support.story_runs import train
from tests.support.task_runs import ENGINES, list_tree
from tests.support.tiny_runs import save_config

pytestmark = pytest.mark.e2e


def switched(world: World, trees: list[dict[str, Any]]) -> list[list[Tensor]]:
    """For each tree: logits of two adapters as they were kept, and after switching a, b, a."""
    found = []
    for tree in trees:
        config, built, loaders, call = build(world, tree)
        bank = AdapterBank(built)

        def logits(built: Any = built, loaders: Any = loaders) -> Tensor:
            with inference_mode(built.model):
                return built.model(input_ids=loaders.probe, use_cache=False).logits.clone()

        seen = []
        for number, name in enumerate("abc"):
            steps = range(2 * number, 2 * number + 2)
            train_steps(world, config, built, loaders, call, steps)
            bank.store_active_adapter(name)
            seen.append(logits())
        for name in "aba":
            bank.activate_adapter(name)
            seen.append(logits())
        assert bank.names == ("a", "b", "c")
        with pytest.raises(KeyError):
            bank.activate_adapter("d")
        found.append(seen)
    return found


@pytest.mark.dist
@pytest.mark.parametrize("ranks", [1, 2])
def test_switching_there_and_back_gives_equal_bits(ranks: int, tmp_path: Path) -> None:
    if ranks > 1:
        pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    tree = list_tree(tmp_path, base__quant={"kind": "nf4"})
    trees = [{**tree, "engine": engine} for engine in (ENGINES if ranks > 1 else [{}])]
    for outcome in run_ranks(switched, ranks, trees):
        for first, second, _, *again in outcome:
            assert not torch.equal(first, second)
            for value, expected in zip(again, (first, second, first), strict=True):
                assert torch.equal(value, expected)


def evaluate(config: Path, *argv: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda text, **_: found.update(json.loads(text)))
        assert cli.main(["eval", "--config", str(config), *argv]) == 0
    close_log()
    return found


def test_eval_gives_each_adapter_on_each_source(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Own losses are those that training measured; the others those of the task's run."""
    tree = list_tree(tmp_path, adapter={"r": 3, "alpha": 8, "init": "pissa"})
    config = save_config(tmp_path, tree)
    assert train(World(), tree) == 0
    run = tmp_path / "run"
    found = evaluate(config, "--run", str(run))
    last = {
        name: read_metrics(task / METRICS_FILE)[-1].eval_loss
        for name, task in list_task_runs(run).items()
    }
    assert found["own"] == {n: pytest.approx(last[n], rel=1e-6) for n in ("short", "long")}
    assert list(found["adapters"]) == ["long", "short", "other"]
    for name, task in list_task_runs(run).items():
        assert found["adapters"][name] == evaluate(config, "--run", str(task))
    own, foreign = (found["adapters"][n]["eval_by_task"]["short"] for n in ("short", "other"))
    assert own != foreign
    one = evaluate(config, "--run", str(run), f"data.eval=[{{path: {tmp_path}/short.jsonl}}]")
    assert list(one["own"]) == ["short"]
    assert one["own"]["short"] == one["adapters"]["short"]["eval_loss"]
    (run / "tasks" / "other" / "checkpoints" / "step-000003" / "run.json").unlink()
    assert cli.main(["eval", "--config", str(config), "--run", str(run)]) == 2
    said = capsys.readouterr().err
    assert "tasks/other/checkpoints is damaged (step-000003: run.json" in said
    close_log()
