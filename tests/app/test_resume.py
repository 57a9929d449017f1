"""Stopped and resumed at another number of ranks, a run goes on as if nothing had happened."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from dist_peft.core.errors import UserError
from dist_peft.core.world import World
from dist_peft.train.checkpoint import CheckpointManager
from tests.support.dist import run_ranks
from tests.support.story_runs import STEPS, STOP, losses, short, train


@pytest.mark.dist
@pytest.mark.data
@pytest.mark.parametrize(
    ("case", "ranks"),
    [({}, 1), ({}, 3), ({"adapter__init": "pissa"}, 3), ({"adapter__init": "loftq"}, 1)],
    ids=str,
)
def test_resumed_at_other_ranks(
    shared_data: Path, tmp_path: Path, case: dict[str, Any], ranks: int
) -> None:
    whole = short(shared_data, tmp_path, "whole", **case)
    assert run_ranks(train, 1, whole) == [0]
    expected = losses(tmp_path / "whole")
    assert len(expected) == STEPS and expected[-1] < expected[0]

    cut = short(shared_data, tmp_path, "cut", **case)
    assert run_ranks(train, 2, cut, STOP) == [75, 75]
    assert len(losses(tmp_path / "cut")) == STOP
    checkpoint = tmp_path / "cut" / "checkpoints" / f"step-{STOP:06d}"
    assert (
        CheckpointManager.read_position(checkpoint).samples == STOP * whole["train"]["global_batch"]
    )
    assert run_ranks(train, ranks, cut) == [0] * ranks
    torch.testing.assert_close(
        torch.tensor(losses(tmp_path / "cut")), torch.tensor(expected), rtol=1e-6, atol=0
    )


@pytest.mark.data
def test_start_factors_are_read_and_not_computed_again(shared_data: Path, tmp_path: Path) -> None:
    """Else a change of the SVD (another torch, another number of ranks) would change the base."""
    tree = short(shared_data, tmp_path, "cut", adapter__init="pissa", train__steps=2)
    assert train(World(), tree, 1) == 75
    again = AssertionError("computed again")
    with (
        mock.patch.object(torch.linalg, "svd", side_effect=again),
        mock.patch.object(torch.linalg, "qr", side_effect=again),
    ):
        assert train(World(), tree) == 0


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "base": ({"base__quant": {"kind": "nf4", "group_size": 32}}, r"base\.quant\.group_size is 32"),
    "compute": ({"base__compute_dtype": "bfloat16"}, r"base\.compute_dtype is"),
    "adapter": ({"adapter__r": 8}, r"adapter\.r is 8, there 4"),
    "data": ({"data__seq_len": 64}, r"data\.seq_len is 64, there 128"),
    "batch": ({"train__global_batch": 8}, r"train\.global_batch is 8, there 4"),
    "seed": ({"train__seed": 1}, r"train\.seed is 1, there 0"),
}


@pytest.mark.data
def test_resume_with_another_configuration_is_refused(shared_data: Path, tmp_path: Path) -> None:
    tree = short(shared_data, tmp_path, "cut", train__steps=2)
    assert train(World(), tree, 1) == 75
    for changes, message in CHANGES.values():
        other = {**tree}
        for key, value in changes.items():
            section, _, name = key.partition("__")
            other[section] = {**other[section], name: value}
        with pytest.raises(UserError, match=message):
            train(World(), other)
    assert (
        train(World(), {**tree, "data": {**tree["data"], "cache_dir": str(tmp_path / "other")}})
        == 0
    )
