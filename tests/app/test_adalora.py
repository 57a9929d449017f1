"""AdaLoRA as runs: masks, losses and files do not depend on engines, ranks and interruptions."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dist_peft.adapters.directory import read_adapter_directory
from dist_peft.core.errors import UserError
from dist_peft.core.world import World
from tests.support.dist import run_ranks
from tests.support.story_runs import losses, train
from tests.support.tiny_runs import tiny_tree

pytestmark = pytest.mark.dist

SECTION = {
    "kind": "adalora",
    **{"init_r": 5, "target_r": 2, "tinit": 1, "tfinal": 2, "delta_t": 2, "alpha": 60},
}


def tree(directory: Path, run: str, **changes: Any) -> dict[str, Any]:
    save = {"dir": str(directory / run), "every": 0}
    settings = {"train__global_batch": 6, "train__steps": 6, "train__lr": 3e-2, **changes}
    return tiny_tree(directory, adapter=SECTION, save=save, base__quant={"kind": "nf4"}, **settings)


def test_cut_in_the_middle_phase_and_in_the_last(tmp_path: Path) -> None:
    """Whole in one process; and 3 steps on three ranks of fsdp2, 2 on two of zero 2, 1 on one."""
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    assert train(World(), tree(tmp_path, "whole")) == 0
    sharded = tree(tmp_path, "cut", engine={"kind": "fsdp2"})
    assert run_ranks(train, 3, sharded, 3) == [75] * 3
    staged = tree(tmp_path, "cut", engine={"kind": "zero", "stage": 2})
    assert run_ranks(train, 2, staged, 2) == [75] * 2
    assert train(World(), tree(tmp_path, "cut")) == 0
    expected, found = losses(tmp_path / "whole"), losses(tmp_path / "cut")
    assert len(found) == 6 and found[-1] < found[0]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=2e-6, atol=0)
    ours, whole = (read_adapter_directory(tmp_path / run / "adapter") for run in ("cut", "whole"))
    pattern = whole.config["rank_pattern"]
    assert ours.config["rank_pattern"] == pattern and whole.config["total_step"] == 6
    assert sum(sum(kept) for kept in pattern.values()) == 2 * len(pattern)
    for name, value in whole.tensors.items():
        torch.testing.assert_close(ours.tensors[name], value, rtol=1e-3, atol=1e-5)


def test_schedule_that_does_not_fit_ends_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tinit 1 and adapter\.tfinal 2 leave none of the 3 steps"):
        train(World(), tree(tmp_path, "short", train__steps=3))
    assert not (tmp_path / "short" / "metrics.jsonl").exists()
