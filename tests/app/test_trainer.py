"""A run between its first and its last step: what ends it early, and what is done already."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_peft.app.trainer import Trainer
from dist_peft.core.errors import RunFailure
from dist_peft.core.log import close_log
from dist_peft.core.world import World
from dist_peft.train.checkpoint import CheckpointManager
from dist_peft.train.objective import TokenObjective
from dist_peft.train.step_metrics import read_metrics
from tests.support.equality import build
from tests.support.tiny_runs import tiny_tree, train

pytestmark = pytest.mark.e2e


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    close_log()


def test_loss_that_is_not_finite_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = tiny_tree(tmp_path, data__eval=[])
    calls = []
    real = TokenObjective.compute_loss

    def poisoned(*args: Any) -> torch.Tensor:
        calls.append(1)
        return real(*args) * (torch.nan if len(calls) > 2 else 1)  # two rows a step

    with monkeypatch.context() as patch:
        patch.setattr(TokenObjective, "compute_loss", poisoned)
        with pytest.raises(RunFailure, match=r"step 2: loss nan.*train\.lr"):
            train(tree)
    run = tmp_path / "run"
    assert [r.step for r in read_metrics(run / "metrics.jsonl")] == [1]
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-000001"]
    assert train(tree) == 0  # resumes from the last good step


def test_finished_run_started_again_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = tiny_tree(tmp_path)
    assert train(tree) == 0
    adapter = (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes()
    assert train(tree) == 0
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes() == adapter
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 3
    assert "has 3 steps and train.steps is 3: nothing is left to train" in capsys.readouterr().err


@pytest.mark.parametrize(("settings", "steps"), [({"epochs": 2.5}, 10), ({"steps": 3}, 3)])
def test_number_of_steps(settings: dict[str, Any], steps: int, tmp_path: Path) -> None:
    """Eight rows, two a step; a part of a step counts whole."""
    tree = tiny_tree(tmp_path)
    tree["train"] = {k: v for k, v in tree["train"].items() if k != "steps"} | settings
    session = session_of(tree, tmp_path)
    assert session.total_steps == steps


def test_ends_at_the_checkpoint_after_its_last_step(tmp_path: Path) -> None:
    tree = tiny_tree(tmp_path)
    assert train(tree) == 0
    second, third = sorted((tmp_path / "run" / "checkpoints").iterdir())
    session = session_of(tree, tmp_path)
    assert session.is_final_checkpoint(third) and not session.is_final_checkpoint(second)


def session_of(tree: dict[str, Any], tmp_path: Path) -> Trainer:
    config, built, loaders, call = build(World(), tree)
    checkpoints = CheckpointManager(tmp_path / "run" / "checkpoints", 2, World())
    return Trainer(config, World(), built, call, loaders, checkpoints, tmp_path / "run")
