"""``train.exact``: the same bits on any number of ranks and every engine, killed and resumed.

Runs of a tiny model, whose seven rows a step make four micro-batches: they divide neither by 2 nor
by 3 ranks without a filler. ``benchmarks/exact_matrix.py`` has the methods, bases and 4 ranks.
"""

from pathlib import Path
from typing import Any

import pytest

from dist_peft.core.errors import UserError
from dist_peft.core.world import World
from tests.support.dist import run_ranks
from tests.support.exact_runs import digest_losses, digest_state
from tests.support.story_runs import train
from tests.support.tiny_runs import tiny_tree

pytest.importorskip("deepspeed", reason="deepspeed is not installed")
pytestmark = pytest.mark.dist

Tree = dict[str, Any]
Cell = tuple[int, str, dict[str, Any]]
"""Ranks, name of the run, ``engine`` section."""

CELLS: list[Cell] = [
    (2, "fsdp2-2", {"kind": "fsdp2"}),
    (2, "zero-2", {"kind": "zero", "stage": 1}),
    (3, "fsdp2-3", {"kind": "fsdp2", "reduce_gradients": "step"}),
    (3, "zero-3", {"kind": "zero", "stage": 2}),
]
CUT = 1


def exact_tree(directory: Path, run: str, engine: dict[str, Any], **changes: Any) -> Tree:
    made = tiny_tree(
        directory,
        adapter={"r": 3, "alpha": 6, "dropout": 0.1, "target_modules": "all-linear"},
        train__global_batch=7,
        train__micro_batch=2,
        train__exact=True,
        train__max_grad_norm=0.05,
        save={"dir": str(directory / run), "every": 0},
        **changes,
    )
    return {**made, "engine": engine}


def train_all(world: World, jobs: list[tuple[Tree, int | None]]) -> list[int]:
    """One set of processes for several runs: starting them takes longer."""
    return [train(world, tree, stop) for tree, stop in jobs]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process, those of ``CELLS``, and one that is cut on one process, then on two
    ranks of fsdp2, and ends on three of zero."""
    directory = tmp_path_factory.mktemp("exact")
    assert train(World(), exact_tree(directory, "single", {"kind": "single"})) == 0
    assert train(World(), exact_tree(directory, "cut", {"kind": "single"}), CUT) == 75
    for ranks in (2, 3):
        jobs: list[tuple[Tree, int | None]] = [
            (exact_tree(directory, run, engine), None)
            for size, run, engine in CELLS
            if size == ranks
        ]
        stop = CUT if ranks == 2 else None
        engine = {"kind": "fsdp2"} if ranks == 2 else {"kind": "zero", "stage": 2}
        jobs.append((exact_tree(directory, "cut", engine), stop))
        codes = [*([0] * (len(jobs) - 1)), 75 if stop else 0]
        assert run_ranks(train_all, ranks, jobs) == [codes] * ranks
    return directory


@pytest.mark.parametrize("run", [*(run for _, run, _ in CELLS), "cut"])
def test_bits_are_those_of_one_process(runs: Path, run: str) -> None:
    assert digest_state(runs / run) == digest_state(runs / "single")
    assert digest_losses(runs / run) == digest_losses(runs / "single")


def test_other_arithmetic_has_other_bits(runs: Path) -> None:
    """The digests see a difference in the last bits: float sums have one."""
    floats = exact_tree(
        runs,
        "floats",
        {"kind": "single"},
    )
    floats["train"] = {**floats["train"], "exact": False}
    assert train(World(), floats) == 0
    assert digest_state(runs / "floats") != digest_state(runs / "single")


def test_what_changes_bits_is_refused_on_resume(runs: Path) -> None:
    tree = exact_tree(runs, "single", {"kind": "single"})
    for key, value in (("micro_batch", 1), ("max_grad_norm", 1.0)):
        changed = {**tree, "train": {**tree["train"], key: value}}
        with pytest.raises(UserError, match=rf"train\.{key} is {value}"):
            train(World(), changed)
