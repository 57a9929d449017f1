"""Several data sets in one run, on real weights: shares, losses by task, resuming elsewhere."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dist_peft.app import cli
from dist_peft.core.config.io import parse_config
from dist_peft.core.world import World
from dist_peft.train.step_metrics import read_metrics
from tests.support.dist import run_ranks
from tests.support.story_runs import losses, train
from tests.support.tiny_runs import save_config, save_records, tiny_tree

pytestmark = pytest.mark.e2e

STOP = 3


def mixed_tree(tmp_path: Path, name: str, **changes: Any) -> dict[str, Any]:
    """Two tasks, the second from step 2 on; three held-out sets, two of the same name."""
    other = str(save_records(tmp_path / "other.jsonl", 5, words=3))
    data = {
        "train": [
            {"path": str(save_records(tmp_path / "train.jsonl")), "name": "long", "weight": 3.0},
            {"path": other, "from_step": 2},
        ],
        "eval": [str(save_records(tmp_path / "held.jsonl", 3)), other, other],
        "mixing": "weights",
        "seq_len": 16,
        "packing": False,
        "cache_dir": str(tmp_path / "cache"),
    }
    save = {"dir": str(tmp_path / name), "every": 0}
    return tiny_tree(tmp_path, data={**data, **changes}, save=save, train__steps=6)


@pytest.mark.dist
def test_resumed_at_other_ranks(tmp_path: Path) -> None:
    assert train(World(), mixed_tree(tmp_path, "whole")) == 0
    expected = losses(tmp_path / "whole")
    assert run_ranks(train, 2, mixed_tree(tmp_path, "cut"), STOP) == [75, 75]
    assert train(World(), mixed_tree(tmp_path, "cut")) == 0
    torch.testing.assert_close(
        torch.tensor(losses(tmp_path / "cut")), torch.tensor(expected), rtol=1e-6, atol=0
    )


def test_losses_by_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = mixed_tree(tmp_path, "run")
    assert train(World(), tree) == 0
    first, *_, last = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert first.eval_by_task_before is not None and last.eval_by_task is not None
    assert list(last.eval_by_task) == ["held", "other", "other-2"]
    assert last.eval_by_task["other"] == last.eval_by_task["other-2"]
    assert all(last.eval_by_task[n] < first.eval_by_task_before[n] for n in last.eval_by_task)
    assert min(last.eval_by_task.values()) < last.eval_loss < max(last.eval_by_task.values())
    config = str(save_config(tmp_path, tree))
    capsys.readouterr()
    assert cli.main(["eval", "--config", config, "--run", str(tmp_path / "run")]) == 0
    assert f'"other-2": {last.eval_by_task["other"]:.6f}'[:16] in capsys.readouterr().out


def test_a_step_without_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = mixed_tree(tmp_path, "run")
    tree["data"]["train"][0]["to_step"] = 1
    assert parse_config(tree).data.train[0].to_step == 1
    assert cli.main(["train", "--config", str(save_config(tmp_path, tree))]) == 2
    assert "no source of data.train is active at step 1" in capsys.readouterr().err
