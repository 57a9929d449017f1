"""Hooks take gradients away and leave zeros; the sums are those of ``FixedPointGradients``."""

import math

import pytest
import torch
from torch import nn

from dist_peft.core.config.run import TrainConfig
from dist_peft.engine import exact_reduction
from dist_peft.engine.exact_gradients import GradientScale
from dist_peft.engine.exact_reduction import ExactReduction

CPU = torch.device("cpu")
SCALE = GradientScale.from_config(TrainConfig(global_batch=3))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> tuple[list[nn.Parameter], ExactReduction]:
    """Three parameters on the only rank, the last one unused."""
    monkeypatch.setattr(exact_reduction.dist, "all_reduce", lambda *_: None)
    parameters = [nn.Parameter(torch.ones(shape)) for shape in ((2, 3), (4,), (2,))]
    return parameters, ExactReduction(parameters, SCALE, CPU)


def test_engine_sees_zeros_and_gets_the_sum(
    made: tuple[list[nn.Parameter], ExactReduction],
) -> None:
    (matrix, vector, _), reduction = made
    for factor in (0.5, 0.25, 1.0):
        (factor * (matrix.sum() + 2 * vector.sum())).backward()
        reduction.end_micro_batch()
    assert matrix.grad is not None and not matrix.grad.any()
    norm, (first, second, third) = reduction.take_gradients(0)
    assert norm == pytest.approx(1.75 * math.sqrt(6 + 16))
    assert third is None and first is not None and second is not None
    assert torch.equal(first, torch.full((2, 3), 1.75))
    assert torch.equal(second, torch.full((4,), 3.5))


def test_clipped_and_not_finite(made: tuple[list[nn.Parameter], ExactReduction]) -> None:
    (matrix, _, _), reduction = made
    (3 * matrix).sum().backward()
    reduction.end_micro_batch()
    norm, (first, *_) = reduction.take_gradients(1.0)
    assert first is not None and float(first.norm()) == pytest.approx(1.0) and norm > 1
    (math.nan * matrix).sum().backward()
    reduction.end_micro_batch()
    norm, (first, *_) = reduction.take_gradients(1.0)
    assert math.isnan(norm) and first is not None and first.isnan().all()


def test_two_backward_passes_of_a_micro_batch(
    made: tuple[list[nn.Parameter], ExactReduction],
) -> None:
    (matrix, _, _), reduction = made
    matrix.sum().backward()
    matrix.sum().backward()
    reduction.end_micro_batch()
    _, (first, *_) = reduction.take_gradients(0)
    assert first is not None and torch.equal(first, torch.full((2, 3), 2.0))
