"""On real weights: neither losses nor adapter gradients depend on engine or number of ranks."""

from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_peft.core.world import World
from tests.support.dist import run_ranks
from tests.support.equality import (
    Outcome,
    all_cases,
    assert_same,
    losses_and_gradients,
)
from tests.support.story_runs import NF4, run_config
from tests.support.turns import list_selected

SHORT = 3
"""Steps of the cases that vary one thing. An engine that loses an update, a row or a part of a
gradient is wrong from the second loss on; that rounding does not grow with steps is seen in "nf4",
which runs 20."""

CASES: dict[str, dict[str, Any]] = {
    "nf4": {"base__quant": NF4},
    "nf4 accumulating, no recomputation": {
        "base__quant": NF4,
        "train__global_batch": 6,
        "engine__activation_checkpointing": False,
        "train__steps": SHORT,
    },
    # the noise of embeddings too, at 2 and 3 ranks
    "int3": {
        "base__quant": {"kind": "int", "bits": 3, "group_size": 32},
        "train__steps": SHORT,
        "train__neftune_alpha": 5,
    },
    "unquantized": {"base__quant": None, "train__steps": SHORT},
    "dora": {"base__quant": NF4, "adapter__use_dora": True, "train__steps": SHORT},
    "embedding": {"base__quant": NF4, "adapter__embeddings": True, "train__steps": SHORT},
    "unsharded base": {"base__quant": NF4, "engine__shard_base": False, "train__steps": SHORT},
    "unpacked rows, packed ends": {
        "base__quant": {**NF4, "embeddings": True},
        "data__packing": False,
        "data__too_long": "truncate",
        "train__steps": SHORT,
    },
    # its loss is below the first only after the fourth step
    "pissa": {"base__quant": NF4, "adapter__init": "pissa", "train__steps": 6},
}


def integer(bits: int) -> dict[str, Any]:
    return {"kind": "int", "bits": bits, "group_size": 32}


ZERO_CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "nf4, stage 1": (
        1,
        {"base__quant": NF4, "train__steps": SHORT, "train__neftune_alpha": 5},
    ),
    "int3 with its ends, stage 2": (
        2,
        {"base__quant": {**integer(3), "embeddings": True}, "train__steps": SHORT},
    ),
    "int4, offload": (
        2,
        {"base__quant": integer(4), "engine__cpu_offload": "optimizer", "train__steps": SHORT},
    ),
    # at 3 ranks DeepSpeed wants a loss times 3, and the whole backward pass rounds otherwise: 1e-6
    # of the first gradients, which a high rate makes more of
    "nf4, embedding": (
        2,
        {"base__quant": NF4, "adapter__embeddings": True, "train__lr": 2e-3, "train__steps": SHORT},
    ),
    # stage 3 comes last: it replaces torch.nn.functional.linear in its process for good
    "nf4, stage 3": (3, {"base__quant": NF4}),  # 20 steps, too
    "int2 with its ends, stage 3, no recomputation": (
        3,
        {
            "base__quant": {**integer(2), "embeddings": True},
            "train__global_batch": 6,
            "engine__activation_checkpointing": False,
            "train__steps": SHORT,
        },
    ),
    "nf4, dora, stage 3": (
        3,
        {"base__quant": NF4, "adapter__use_dora": True, "train__steps": SHORT},
    ),
    "nf4, pissa, stage 3": (3, {"base__quant": NF4, "adapter__init": "pissa", "train__steps": 6}),
    "lora+, stage 3": (
        3,
        {"base__quant": NF4, "adapter__lr_ratio": 2.0, "train__lr": 1e-3, "train__steps": SHORT},
    ),
}

ALTERNATE: dict[str, int] = {
    **{"nf4 accumulating, no recomputation": 0, "int2 with its ends, stage 3, no recomputation": 1},
    **{"dora": 0, "nf4, dora, stage 3": 1},
    **{"embedding": 1, "nf4, embedding": 0},
    **{"pissa": 0, "nf4, pissa, stage 3": 1},
    **{"unpacked rows, packed ends": 1, "int3 with its ends, stage 2": 0},
}
"""Case -> the turn it runs in: each pair is one feature, on fsdp2 in one turn and on zero in the
other. Each turn has fsdp2 and all stages of zero."""


def take_turns(cases: Iterable[str]) -> list[Any]:
    """Return the cases as parameters, those that alternate with their turn."""
    marks = {case: pytest.mark.turn(turn, 2) for case, turn in ALTERNATE.items()}
    return [pytest.param(c, marks=marks[c]) if c in marks else c for c in cases]


UNEVEN = (
    *("int3", "dora", "embedding"),
    *("nf4, stage 1", "nf4, embedding", "nf4, dora, stage 3"),
)
"""Cases that run at 3 ranks too, which divide no row count of the model."""


@pytest.fixture(scope="module")
def outcomes(
    shared_data: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> dict[int, list[dict[str, Outcome]]]:
    """Number of ranks -> what each rank got in each case; one set of processes for each number."""
    directory = tmp_path_factory.mktemp("equality")
    tests = (test_fsdp2_equals_single, test_zero_equals_single)
    chosen = {cell["case"] for test in tests for cell in list_selected(request.session, test)}

    def make_tree(changes: dict[str, Any], **engine: Any) -> dict[str, Any]:
        return run_config(shared_data, directory, **{"engine": engine, **changes})

    trees = {case: make_tree(changes) for case, changes in CASES.items() if case in chosen}
    if find_spec("deepspeed"):
        trees |= {
            case: make_tree(changes, kind="zero", stage=stage)
            for case, (stage, changes) in ZERO_CASES.items()
            if case in chosen
        }
    uneven = {case: tree for case, tree in trees.items() if case in UNEVEN}
    singles = {case: run_alone(tree) for case, tree in trees.items()}
    # cases that differ in their engine have one reference
    different = {repr(tree): tree for tree in singles.values()}
    alone = all_cases(World(), different)
    return {
        1: [{case: alone[repr(tree)] for case, tree in singles.items()}],
        2: run_ranks(all_cases, 2, trees, timeout=800),
        3: run_ranks(all_cases, 3, uneven, timeout=800),
    }


def run_alone(tree: dict[str, Any]) -> dict[str, Any]:
    """The same run in one process, of which recomputation is the only choice of the engine."""
    engine = {k: v for k, v in tree["engine"].items() if k == "activation_checkpointing"}
    return {**tree, "engine": engine}


@pytest.mark.dist
@pytest.mark.data
@pytest.mark.parametrize("case", take_turns(CASES))
def test_fsdp2_equals_single(outcomes: dict[int, list[dict[str, Outcome]]], case: str) -> None:
    """fp32 losses of all steps within 1e-6 of one process's, gradients after them likewise."""
    check_case(outcomes, case)


@pytest.mark.dist
@pytest.mark.data
@pytest.mark.parametrize("case", take_turns(ZERO_CASES))
def test_zero_equals_single(outcomes: dict[int, list[dict[str, Outcome]]], case: str) -> None:
    """Every stage, NF4 and INT4/3/2: as with fsdp2."""
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    check_case(outcomes, case)


def check_case(outcomes: dict[int, list[dict[str, Outcome]]], case: str) -> None:
    for outcome in [*outcomes[2], *(outcomes[3] if case in UNEVEN else [])]:
        assert_same(outcome[case], outcomes[1][0][case])


@pytest.mark.dist
@pytest.mark.data
def test_8bit_adam_on_shards(shared_data: Path, tmp_path: Path) -> None:
    """A shard cuts bitsandbytes' blocks of 256 elsewhere, so losses are only close."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    changes = {"adapter__r": 128, "train__lr": 1e-3, "train__steps": SHORT, "base__quant": NF4}
    tree = run_config(shared_data, tmp_path, train__optimizer="adamw8bit", **changes)
    plain = run_config(shared_data, tmp_path, **changes)
    (exact, _), (expected, _) = (losses_and_gradients(World(), t) for t in (plain, tree))
    assert expected != exact, "the 8-bit optimizer was used"
    for losses, _ in run_ranks(losses_and_gradients, 2, tree):
        torch.testing.assert_close(losses, expected, rtol=2e-3, atol=0)
