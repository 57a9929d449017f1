"""Real weights on DeepSpeed ZeRO: every stage, NF4 and INT4/3/2, against the single process."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.dist import run_ranks
from tests.support.equality import Outcome, all_cases, assert_same
from tests.support.story_runs import NF4, run_config

pytest.importorskip("deepspeed", reason="deepspeed is not installed")
pytestmark = [pytest.mark.dist, pytest.mark.data]


def integer(bits: int) -> dict[str, Any]:
    return {"kind": "int", "bits": bits, "group_size": 32}


SHORT = {"train__steps": 4}
"""As in ``test_equality``: "nf4, stage 3" runs 20."""
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "nf4, stage 1": (1, {"base__quant": NF4, **SHORT}),
    "int3, stage 2": (2, {"base__quant": integer(3), **SHORT}),
    "int4, offload": (
        2,
        {"base__quant": integer(4), "engine__cpu_offload": "optimizer", **SHORT},
    ),
    # at 3 ranks DeepSpeed wants a loss times 3, and the whole backward pass rounds otherwise: 1e-6
    # of the first gradients, which a high rate makes more of
    "nf4, embedding": (
        2,
        {"base__quant": NF4, "adapter__embeddings": True, "train__lr": 2e-3, **SHORT},
    ),
    # stage 3 comes last: it replaces torch.nn.functional.linear in its process for good
    "nf4, stage 3": (3, {"base__quant": NF4}),
    "int2, stage 3, no recomputation": (
        3,
        {
            "base__quant": integer(2),
            "train__global_batch": 6,
            "engine__activation_checkpointing": False,
            **SHORT,
        },
    ),
    "nf4, dora, stage 3": (3, {"base__quant": NF4, "adapter__use_dora": True, **SHORT}),
    "nf4, pissa, stage 3": (3, {"base__quant": NF4, "adapter__init": "pissa", "train__steps": 6}),
    "lora+, stage 3": (
        3,
        {"base__quant": NF4, "adapter__lr_ratio": 2.0, "train__lr": 1e-3, **SHORT},
    ),
}

UNEVEN = ("nf4, stage 1", "nf4, embedding", "nf4, dora, stage 3")
"""Cases that run at 3 ranks too, which divide no row count of the model."""


@pytest.fixture(scope="module")
def outcomes(
    shared_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, list[dict[str, Outcome]]]:
    """Number of ranks -> what each rank got in each case."""
    directory = tmp_path_factory.mktemp("equality")
    result = {}
    for ranks in (1, 2, 3):
        trees = {}
        for case, (stage, changes) in CASES.items():
            if ranks == 3 and case not in UNEVEN:
                continue
            engine = {"kind": "zero", "stage": stage} if ranks > 1 else {}
            single = {k: v for k, v in changes.items() if ranks > 1 or "offload" not in k}
            trees[case] = run_config(shared_data, directory, **{"engine": engine, **single})
        result[ranks] = run_ranks(all_cases, ranks, trees, timeout=400)
    return result


@pytest.mark.parametrize("case", CASES)
def test_zero_equals_single(outcomes: dict[int, list[dict[str, Outcome]]], case: str) -> None:
    """fp32 losses within 1e-6 of one process's, gradients after them likewise."""
    for outcome in [*outcomes[2], *(outcomes[3] if case in UNEVEN else [])]:
        assert_same(outcome[case], outcomes[1][0][case])
