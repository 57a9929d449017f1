from typing import Any

import pytest
import torch

from dist_peft.adapters.low_rank.pooling import Pooling, pooling_sum_factor, read_pooling_facts
from dist_peft.core.errors import UserError


@pytest.mark.parametrize(("features", "size"), [(64, 32), (128, 8), (48, 48), (64, 8)])
def test_factor_from_the_programs_own_formulas(features: int, size: int) -> None:
    """``peft``: ``QALoraLinearVariant.forward``; ``mean``: the authors' ``peft_utils.py``."""
    groups = features // size
    x, A, B = torch.randn(3, features).double(), torch.randn(2, groups), torch.randn(5, 2)
    A, B = A.double(), B.double()
    by_mean = torch.nn.AvgPool1d(size)(x)
    theirs = {
        "sum": (by_mean * size) @ A.T @ B.T,  # algorithm 1 of the paper
        "mean": by_mean @ A.T @ B.T,
        "peft": (x.view(-1, groups, size).mean(2) * groups) @ A.T @ B.T,
    }
    summed = x.view(-1, groups, size).sum(2)
    for convention, expected in theirs.items():
        factor = pooling_sum_factor(Pooling(size, convention), groups)  # type: ignore[arg-type]
        torch.testing.assert_close(summed @ A.T @ (B * factor).T, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"peft_type": "LORA"}, None),
        ({"peft_type": "LORA", "use_qalora": False, "qalora_group_size": 16}, None),
        ({"peft_type": "LORA", "use_qalora": True}, Pooling(16, "peft")),
        (
            {"peft_type": "LORA", "use_qalora": True, "qalora_group_size": 32},
            Pooling(32, "peft"),
        ),
        (
            {"use_qalora": True, "qalora_group_size": 32, "qalora_pool": "mean"},
            Pooling(32, "mean"),
        ),
        (
            {"peft_type": "QALORA", "qalora_group_size": 64, "qalora_pool": "sum"},
            Pooling(64, "sum"),
        ),
    ],
)
def test_read(config: dict[str, Any], expected: Pooling | None) -> None:
    assert read_pooling_facts(config) == expected


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "QALORA"}, "qalora_pool is None, not one of sum, mean, peft"),
        ({"use_qalora": True, "qalora_pool": "max"}, "qalora_pool is 'max'"),
        ({"use_qalora": True, "qalora_group_size": 0}, "qalora_group_size is 0"),
        ({"use_qalora": True, "qalora_group_size": "32"}, "qalora_group_size is '32'"),
    ],
)
def test_unusable(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_pooling_facts(config)
