"""PEFT's ``RankAllocator`` is the reference."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from peft.tuners.adalora.layer import RankAllocator
from torch import nn

from dist_peft.adapters.adalora.budget import (
    BudgetSchedule,
    choose_kept_triplets,
    score_triplets,
)


def theirs(tinit: int, tfinal: int, delta: int, total: int) -> Any:
    config = SimpleNamespace(
        beta1=0.85,
        beta2=0.85,
        tinit=tinit,
        tfinal=tfinal,
        deltaT=delta,
        total_step=total,
        target_r=3,
    )
    model = nn.ModuleDict()
    for name in ("p", "q"):
        shapes = {"lora_A": (5, 4), "lora_B": (6, 5), "lora_E": (5, 1)}
        model[name] = nn.ModuleDict(
            {n: nn.ParameterDict({"default": torch.zeros(s)}) for n, s in shapes.items()}
        )
    return RankAllocator(model, cast(Any, config), "default"), model


@pytest.mark.parametrize("case", [(0, 0, 1, 7), (2, 3, 2, 12), (1, 0, 3, 20)])
def test_budgets_are_pefts(case: tuple[int, int, int, int]) -> None:
    tinit, tfinal, delta, total = case
    allocator, _ = theirs(*case)
    ours = BudgetSchedule(10, 6, tinit, tfinal, delta, total)
    for done in range(1, total + 1):
        budget, masks = allocator.budget_schedule(done)
        if done >= total - tfinal:
            assert ours.get_budget(done) == 6
        else:
            assert ours.get_budget(done) == (budget if masks else None)
        assert ours.counts_importance(done) == (done < total - tfinal)


def test_kept_triplets_are_pefts() -> None:
    allocator, model = theirs(0, 0, 1, 9)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        allocator.exp_avg_ipt[name] = torch.rand(parameter.shape, generator=generator)
        allocator.exp_avg_unc[name] = torch.rand(parameter.shape, generator=generator)
    scores = []
    for path in ("p", "q"):
        own = []
        for kept in (allocator.exp_avg_ipt, allocator.exp_avg_unc):
            a, e, b = (kept[f"{path}.{n}.default"] for n in ("lora_A", "lora_E", "lora_B"))
            own.append((a, e[:, 0], b))
        scores.append(score_triplets(*own))
    for budget in (3, 6, 9):
        pattern = allocator.mask_to_budget(model, budget)
        for path, kept in zip("pq", choose_kept_triplets(scores, budget), strict=True):
            assert kept.tolist() == pattern[f"{path}.lora_E.default"]
    assert all(kept.all() for kept in choose_kept_triplets(scores, 10))
