"""On real weights: neither losses nor adapter gradients depend on engine or number of ranks."""

from pathlib import Path

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

SHORT = 4
"""Steps of the cases that vary one thing. An engine that loses an update, a row or a part of a
gradient is wrong from the second loss on; that rounding does not grow with steps is seen in "nf4",
which runs 20."""

CASES = {
    "nf4": {"base__quant": NF4},
    "nf4 accumulating, no recomputation": {
        "base__quant": NF4,
        "train__global_batch": 6,
        "engine__activation_checkpointing": False,
        "train__steps": SHORT,
    },
    "int3": {
        "base__quant": {"kind": "int", "bits": 3, "group_size": 32},
        "train__steps": SHORT,
    },
    "unquantized": {"base__quant": None, "train__steps": SHORT},
    "dora": {"base__quant": NF4, "adapter__use_dora": True, "train__steps": SHORT},
    "embedding": {"base__quant": NF4, "adapter__embeddings": True, "train__steps": SHORT},
    "unsharded base": {"base__quant": NF4, "engine__shard_base": False, "train__steps": SHORT},
    "unpacked": {
        "base__quant": NF4,
        "data__packing": False,
        "data__too_long": "truncate",
        "train__steps": SHORT,
    },
    # its loss is below the first only after the fourth step
    "pissa": {"base__quant": NF4, "adapter__init": "pissa", "train__steps": 6},
}


UNEVEN = ("int3", "dora", "embedding")
"""Cases that run at 3 ranks too, which divide no row count of the model."""


@pytest.fixture(scope="module")
def outcomes(
    shared_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, list[dict[str, Outcome]]]:
    """Number of ranks -> what each rank got in each case."""
    directory = tmp_path_factory.mktemp("equality")
    trees = {
        case: run_config(shared_data, directory, **{"engine": {}, **changes})
        for case, changes in CASES.items()
    }
    uneven = {case: trees[case] for case in UNEVEN}
    return {
        ranks: run_ranks(all_cases, ranks, cases, timeout=400)
        for ranks, cases in ((1, trees), (2, trees), (3, uneven))
    }


@pytest.mark.dist
@pytest.mark.data
@pytest.mark.parametrize("case", CASES)
def test_fsdp2_equals_single(outcomes: dict[int, list[dict[str, Outcome]]], case: str) -> None:
    """fp32 losses of all steps within 1e-6 of one process's, gradients after them likewise."""
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
