"""Bottleneck adapters on every engine: losses, resuming, the finished run, AdapterHub's library."""

from pathlib import Path
from typing import Any

import pytest

from dist_peft.core.world import World
from tests.app.test_equality import GRADIENT_TOLERANCE, NF4, Outcome, all_cases, assert_same
from tests.app.tiny import save_records, tiny_tree
from tests.dist import run_ranks

pytestmark = pytest.mark.dist

INT4 = {"kind": "int", "bits": 4, "group_size": 32}
CASES: dict[str, dict[str, Any]] = {
    "pfeiffer": {"adapter": {"kind": "bottleneck", "dropout": 0.1}, "base__quant": NF4},
    # three rows in a bottleneck: not divisible by the ranks
    "houlsby and norms": {
        "adapter": {
            "kind": "bottleneck",
            "placement": "houlsby",
            "reduction_factor": 20,
            "train_layernorm": True,
        },
        "base__quant": INT4,
    },
    "parallel, unpacked": {
        "adapter": {"kind": "bottleneck", "placement": "parallel"},
        "data__packing": False,
        "train__micro_batch": 2,
        "engine__activation_checkpointing": False,
    },
}
RUNS: dict[str, dict[str, Any]] = {
    "fsdp2": {"kind": "fsdp2"},
    "zero 2": {"kind": "zero", "stage": 2},
    "zero 3": {"kind": "zero", "stage": 3},  # last: it replaces functional.linear for good
}


def tree(directory: Path, case: str, **changes: Any) -> dict[str, Any]:
    """Four rows a step, of three short documents each where packed."""
    short = {
        "train__steps": 3,
        "train__global_batch": 4,
        "data__train": [str(save_records(directory / "twelve.jsonl", 12))],
        "data__packing": True,
        "data__seq_len": 32,
        "engine": {},
    }
    return tiny_tree(directory, **{**short, **CASES[case], **changes})


def all_runs(world: World, trees: dict[str, dict[str, Any]]) -> dict[str, dict[str, Outcome]]:
    """One set of processes for everything: starting them takes longer than the cases."""
    return {run: all_cases(world, cases) for run, cases in trees.items()}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Outcome]]]:
    """Run -> what each rank got in each case; "single" is the reference."""
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    directory = tmp_path_factory.mktemp("bottleneck")
    singles = {case: tree(directory, case) for case in CASES}
    trees = {
        run: {case: {**t, "engine": {**t["engine"], **engine}} for case, t in singles.items()}
        for run, engine in RUNS.items()
    }
    found = run_ranks(all_runs, 2, trees, timeout=400)
    by_run = {run: [outcome[run] for outcome in found] for run in RUNS}
    return {"single": [all_cases(World(), singles)], **by_run}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("run", RUNS)
def test_equals_single(outcomes: dict[str, list[dict[str, Outcome]]], run: str, case: str) -> None:
    """fp32 losses within 1e-6 of one process's, gradients likewise; losses fall."""
    expected = outcomes["single"][0][case]
    tolerance = 5e-4 if run == "zero 3" else GRADIENT_TOLERANCE  # see test_equality_zero
    for outcome in outcomes[run]:
        assert_same(outcome[case], expected, tolerance)
    print(f"{case}, {run}: loss {expected[0][0]:.4f} -> {expected[0][-1]:.4f}")
