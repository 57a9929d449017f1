"""Cases of a method on several engines, against one process: what many tests here do."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_peft.core.world import World
from tests.support.dist import run_ranks
from tests.support.equality import Outcome, all_cases, assert_same
from tests.support.story_runs import losses, train

Runs = dict[str, tuple[int, dict[str, Any], tuple[str, ...]]]
"""Name -> ranks, ``engine`` section, cases. Runs of zero 3 come last: what it does to its process
(another ``functional.linear``) stays there. Their names begin with "zero 3"."""

Outcomes = dict[str, list[dict[str, Outcome]]]
"""Run -> what each rank got in each case; "single" is the reference."""


def outcomes_of(singles: dict[str, dict[str, Any]], runs: Runs) -> Outcomes:
    """Train every case in one process, and on the engines that ``runs`` says.

    Args:
        singles: the configuration of each case.
    """
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    found: Outcomes = {"single": [all_cases(World(), singles)]}
    for ranks in {ranks: None for ranks, _, _ in runs.values()}:
        trees = {
            run: {c: _on(singles[c], engine) for c in cases}
            for run, (size, engine, cases) in runs.items()
            if size == ranks
        }
        results = run_ranks(_all_runs, ranks, trees, timeout=600)
        found |= {run: [result[run] for result in results] for run in trees}
    return found


def _on(tree: dict[str, Any], engine: dict[str, Any]) -> dict[str, Any]:
    return {**tree, "engine": {**tree.get("engine", {}), **engine}}


def _all_runs(world: World, trees: dict[str, dict[str, Any]]) -> dict[str, dict[str, Outcome]]:
    """One set of processes for everything: starting them takes longer than the cases."""
    return {run: all_cases(world, cases) for run, cases in trees.items()}


def pairs(runs: Runs) -> list[tuple[str, str]]:
    """Every run with each of its cases."""
    return [(run, case) for run, (_, _, cases) in runs.items() for case in cases]


def check_equals_single(outcomes: Outcomes, run: str, case: str) -> None:
    """fp32 losses within 1e-6 of one process's, gradients likewise; losses fall."""
    expected = outcomes["single"][0][case]
    for outcome in outcomes[run]:
        assert_same(outcome[case], expected)
    print(f"{case}, {run}: loss {expected[0][0]:.4f} -> {expected[0][-1]:.4f}")


def check_resumes(
    directory: Path, make: Callable[..., dict[str, Any]], ranks: int, **engine: Any
) -> None:
    """Stopped on several ranks (fsdp2), a run goes on in one process as if nothing had happened.

    Leaves ``directory/whole`` and ``directory/cut``.

    Args:
        make: a configuration, with the given changes.
        engine: further settings of the first part.
    """
    steps, stop = 4, 2

    def short(name: str, **changes: Any) -> dict[str, Any]:
        save = {"dir": str(directory / name), "every": 0}
        return make(save=save, train__steps=steps, **changes)

    assert train(World(), short("whole")) == 0
    assert (
        run_ranks(train, ranks, short("cut", engine={"kind": "fsdp2", **engine}), stop)
        == [75] * ranks
    )
    assert train(World(), short("cut")) == 0
    expected, found = losses(directory / "whole"), losses(directory / "cut")
    assert len(found) == steps and expected[-1] < expected[0]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-6, atol=0)
