"""``train.exact``: the same bits on any number of ranks and every engine, killed and resumed.

Runs of a tiny model, whose seven rows a step make four micro-batches: they divide neither by 2 nor
by 3 ranks without a filler. Other methods take turns over the engines.
``benchmarks/exact_matrix.py`` has all of them, and 4 ranks.
"""

import os
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from dist_peft.app import trainer as trainer_app
from dist_peft.core.errors import UserError
from dist_peft.core.world import World
from tests.support.dist import run_ranks
from tests.support.exact_runs import digest_losses, digest_state
from tests.support.fusion_runs import train_adapters
from tests.support.story_runs import train
from tests.support.tiny_runs import tiny_tree
from tests.support.turns import list_selected, number_turn

pytest.importorskip("deepspeed", reason="deepspeed is not installed")
pytestmark = pytest.mark.dist

Tree = dict[str, Any]
Job = tuple[Tree, int | None]
"""A run, and during which step a signal stops it."""

ENGINES: dict[str, tuple[int, dict[str, Any]]] = {
    "fsdp2-2": (2, {"kind": "fsdp2"}),
    "zero1-2": (2, {"kind": "zero", "stage": 1}),
    "fsdp2-3": (3, {"kind": "fsdp2", "reduce_gradients": "step"}),
    "zero3-3": (3, {"kind": "zero", "stage": 3}),
}
"""Ranks and ``engine`` section."""

LORA = {"r": 3, "alpha": 6, "dropout": 0.1, "target_modules": "all-linear"}
INT4 = {"kind": "int", "bits": 4, "group_size": 8}
METHODS: dict[str, tuple[dict[str, Any] | None, dict[str, Any]]] = {
    "qlora": ({"kind": "nf4"}, LORA),
    "qalora": (INT4, {"kind": "qalora", "r": 3}),
    "bottleneck": (None, {"kind": "bottleneck", "reduction_factor": 9}),
    "fusion": (None, {"kind": "fusion"}),
    "prefix": (None, {"kind": "prefix", "num_virtual_tokens": 3, "encoder_hidden_size": 16}),
    "ptuning": (None, {"kind": "ptuning", "num_virtual_tokens": 3}),
    "prompt": (None, {"kind": "prompt", "num_virtual_tokens": 5}),
    "ia3": (None, {"kind": "ia3"}),
    "adalora": (
        None,
        {"kind": "adalora", "init_r": 4, "target_r": 2, "tinit": 0, "tfinal": 1, "delta_t": 1},
    ),
}
"""Base and adapter."""

CELLS = [
    pytest.param(m, e, marks=number_turn((m, list(METHODS)), (e, list(ENGINES)), of=8))
    for m in METHODS
    for e in ENGINES
]
CUT = 1
KILLED = 2


def exact_tree(directory: Path, run: str, engine: dict[str, Any], **changes: Any) -> Tree:
    made = tiny_tree(
        directory,
        adapter=LORA,
        train__global_batch=7,
        train__micro_batch=2,
        train__exact=True,
        train__max_grad_norm=0.05,
        save={"dir": str(directory / run), "every": 0},
    )
    for key, value in changes.items():
        section, _, name = key.partition("__")
        made[section] = {**made[section], name: value} if name else value
    return {**made, "engine": engine}


def train_all(world: World, jobs: list[Job]) -> list[int]:
    """One set of processes for several runs: starting them takes longer."""
    return [train(world, tree, stop) for tree, stop in jobs]


def train_until_killed(world: World, tree: Tree) -> None:
    """Kill the rank after the metrics of a step, before its checkpoint."""

    def die(step: int) -> None:
        if step > KILLED:
            os.kill(os.getpid(), signal.SIGKILL)

    with mock.patch.object(trainer_app, "note_step", die):
        train(world, tree)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """The run of one process, one of each engine, those of ``CELLS``, one that is cut on one
    process, then on two ranks of fsdp2, and ends on three of ZeRO 2, and one that is killed on
    three ranks of fsdp2 and ends on two of ZeRO 2."""
    directory = tmp_path_factory.mktemp("exact")
    cells = [
        (values["method"], values["engine"])
        for values in list_selected(request.session, test_methods_have_the_bits_of_one_process)
    ]
    fused = _train_fused(directory, cells)
    single = {"kind": "single"}
    jobs = {size: list(_list_jobs(directory, size, cells, fused)) for size in (1, 2, 3)}
    jobs[1] += [
        (exact_tree(directory, "single", single), None),
        (exact_tree(directory, "cut", single), CUT),
    ]
    killed = exact_tree(
        directory,
        "killed",
        {"kind": "fsdp2"},
        save={"dir": str(directory / "killed"), "every": 1, "keep": 1, "asynchronous": False},
    )
    with pytest.raises(AssertionError, match="process died without a word"):
        run_ranks(train_until_killed, 3, killed)
    assert [p.name for p in (directory / "killed" / "checkpoints").glob("step-*")] == [
        f"step-{KILLED:06d}"
    ]
    zero2 = {"kind": "zero", "stage": 2}
    jobs[2] += [
        ({**killed, "engine": zero2}, None),
        (exact_tree(directory, "cut", {"kind": "fsdp2"}), CUT),
    ]
    jobs[3].append((exact_tree(directory, "cut", zero2), None))
    for size, own in jobs.items():
        codes = [75 if stop else 0 for _, stop in own]
        assert run_ranks(train_all, size, own) == [codes] * size
    return directory


def _train_fused(directory: Path, cells: Iterable[tuple[str, str]]) -> list[Any]:
    if all(method != "fusion" for method, _ in cells):
        return []
    tree = tiny_tree(directory)
    return train_adapters(directory / "fused", tree)


def _list_jobs(
    directory: Path, size: int, cells: Iterable[tuple[str, str]], fused: list[Any]
) -> Iterable[Job]:
    """The uninterrupted runs on ``size`` ranks."""
    for name, (ranks, engine) in ENGINES.items():
        if ranks == size:
            yield exact_tree(directory, name, engine), None
    wanted = {(method, "single") for method, _ in cells} if size == 1 else set(cells)
    for method, name in sorted(wanted):
        ranks, engine = ENGINES.get(name, (1, {"kind": "single"}))
        if ranks == size:
            quant, adapter = METHODS[method]
            adapter = adapter | ({"adapters": fused} if method == "fusion" else {})
            run = f"{method}-{name}"
            yield exact_tree(directory, run, engine, adapter=adapter, base__quant=quant), None


def assert_same_bits(own: Path, single: Path) -> None:
    assert digest_state(own) == digest_state(single)
    assert digest_losses(own) == digest_losses(single)


@pytest.mark.parametrize("run", [*ENGINES, "cut", "killed"])
def test_bits_are_those_of_one_process(runs: Path, run: str) -> None:
    assert_same_bits(runs / run, runs / "single")


@pytest.mark.parametrize(("method", "engine"), CELLS)
def test_methods_have_the_bits_of_one_process(runs: Path, method: str, engine: str) -> None:
    assert_same_bits(runs / f"{method}-{engine}", runs / f"{method}-single")


def test_other_arithmetic_has_other_bits(runs: Path) -> None:
    """The digests see a difference in the last bits: float sums have one."""
    floats = exact_tree(runs, "floats", {"kind": "single"}, train__exact=False)
    assert train(World(), floats) == 0
    assert digest_state(runs / "floats") != digest_state(runs / "single")


def test_what_changes_bits_is_refused_on_resume(runs: Path) -> None:
    tree = exact_tree(runs, "single", {"kind": "single"})
    for key, value in (("micro_batch", 1), ("max_grad_norm", 1.0)):
        changed = {**tree, "train": {**tree["train"], key: value}}
        with pytest.raises(UserError, match=rf"train\.{key} is {value}"):
            train(World(), changed)
