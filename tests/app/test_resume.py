"""Stopped, and resumed on another engine or number of ranks, a run gives the same losses."""

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from dist_peft.core.errors import UserError
from dist_peft.core.world import World
from dist_peft.train.checkpoint import CheckpointManager
from tests.support.dist import run_ranks
from tests.support.story_runs import STEPS, STOP, losses, short, train

Begun = tuple[Path, Path]
"""Directories of an uninterrupted run in one process, and of the same run that was stopped."""


@pytest.fixture(scope="module")
def begin(
    shared_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, dict[str, Any], int], Begun]:
    """Train a case whole, and up to the stop on an engine and a number of ranks: each once."""
    directory = tmp_path_factory.mktemp("resume")

    @cache
    def train_whole(case: str) -> Path:
        whole = short(shared_data, directory, f"whole {case}", **CASES[case])
        assert train(World(), whole) == 0
        return Path(whole["save"]["dir"])

    @cache
    def train_cut(case: str, engine: str, stage: int | None, ranks: int) -> Path:
        section = {"kind": engine} if stage is None else {"kind": engine, "stage": stage}
        name = f"cut {case} {engine} {ranks}"
        cut = short(shared_data, directory, name, engine=section, **CASES[case])
        assert run_ranks(train, ranks, cut, STOP) == [75] * ranks
        return Path(cut["save"]["dir"])

    def train_both(case: str, engine: dict[str, Any], ranks: int) -> Begun:
        return train_whole(case), train_cut(case, engine["kind"], engine.get("stage"), ranks)

    return train_both


CASES: dict[str, dict[str, Any]] = {
    "nf4": {},
    "pissa": {"adapter__init": "pissa"},
    "loftq": {"adapter__init": "loftq"},
}


@pytest.mark.dist
@pytest.mark.data
@pytest.mark.parametrize(
    ("case", "ranks"),
    [
        *(("nf4", 1), ("nf4", 3)),
        # factors of the start that are read again, of one initialization in each turn
        pytest.param("pissa", 3, marks=pytest.mark.turn(0, 2)),
        pytest.param("loftq", 1, marks=pytest.mark.turn(1, 2)),
    ],
)
def test_resumed_at_other_ranks(
    begin: Callable[..., Begun], shared_data: Path, tmp_path: Path, case: str, ranks: int
) -> None:
    whole, stopped = begin(case, {"kind": "fsdp2"}, 2)
    expected = losses(whole)
    assert len(expected) == STEPS and min(expected) < expected[0]

    shutil.copytree(stopped, tmp_path / "cut")
    cut = short(shared_data, tmp_path, "cut", **CASES[case])
    assert len(losses(tmp_path / "cut")) == STOP
    checkpoint = tmp_path / "cut" / "checkpoints" / f"step-{STOP:06d}"
    assert (
        CheckpointManager.read_position(checkpoint).samples == STOP * cut["train"]["global_batch"]
    )
    assert run_ranks(train, ranks, cut) == [0] * ranks
    torch.testing.assert_close(
        torch.tensor(losses(tmp_path / "cut")), torch.tensor(expected), rtol=1e-6, atol=0
    )


def zero(stage: int) -> dict[str, Any]:
    return {"kind": "zero", "stage": stage}


ENGINES: dict[str, tuple[dict[str, Any], int, dict[str, Any], int, str]] = {
    "fsdp2 on 2 -> zero 2 on 3": ({"kind": "fsdp2"}, 2, zero(2), 3, "pissa"),
    "zero 1 on 3 -> zero 3 on 2": (zero(1), 3, zero(3), 2, "nf4"),
}


@pytest.mark.dist
@pytest.mark.data
@pytest.mark.parametrize(
    "engines",
    [pytest.param(e, marks=pytest.mark.turn(i, 2)) for i, e in enumerate(ENGINES)],
)
def test_resumed_in_another_engine(
    begin: Callable[..., Begun], shared_data: Path, tmp_path: Path, engines: str
) -> None:
    """The losses after are the uninterrupted run's, and the adapter written is whole."""
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    first, ranks, second, other_ranks, case = ENGINES[engines]
    whole, stopped = begin(case, first, ranks)
    shutil.copytree(stopped, tmp_path / "cut")
    cut = short(shared_data, tmp_path, "cut", engine=second, **CASES[case])
    assert run_ranks(train, other_ranks, cut) == [0] * other_ranks
    expected, found = losses(whole), losses(tmp_path / "cut")
    assert len(found) == STEPS
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=2e-6, atol=0)
    adapters = [
        load_file(run / "adapter" / "adapter_model.safetensors")
        for run in (whole, tmp_path / "cut")
    ]
    assert adapters[0].keys() == adapters[1].keys()
    for key, want in adapters[0].items():
        assert adapters[1][key].numel() and adapters[1][key].shape == want.shape
        torch.testing.assert_close(adapters[1][key], want, rtol=1e-2, atol=1e-4, msg=key)


@pytest.mark.e2e
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


@pytest.mark.e2e
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
