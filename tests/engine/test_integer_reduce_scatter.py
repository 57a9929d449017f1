"""The reduce-scatter that FSDP2 calls, with ranks that are played one after another."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dist_peft.core.config.run import TrainConfig
from dist_peft.engine import integer_reduce_scatter
from dist_peft.engine.exact_gradients import GradientRange, GradientScale
from dist_peft.engine.integer_reduce_scatter import IntegerReduceScatter

SCALE = GradientScale.from_config(TrainConfig(global_batch=6))
MICRO = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)) * torch.tensor(
    [[1e-4], [1.0], [30.0]]
)


def reduce(monkeypatch: pytest.MonkeyPatch, is_kept_whole: bool) -> tuple[list[Tensor], int]:
    """What rank 1 of 2 gives to FSDP2 in each of three micro-batches; rank 0 has the same ones."""
    calls = 0

    def scatter(part: Tensor, total: Tensor, group: Any) -> None:
        nonlocal calls
        calls += 1
        assert total.dtype == torch.int64
        part.copy_(2 * total[len(part) :])

    monkeypatch.setattr(integer_reduce_scatter, "reduce_scatter", scatter)
    made = IntegerReduceScatter(SCALE, GradientRange(torch.device("cpu")), is_kept_whole)
    given = []
    for step in range(2):
        for number, values in enumerate(MICRO):
            made.is_last = number == 2
            output = made.allocate((4,), dtype=torch.float32, device=torch.device("cpu"))
            made(output, values, None, None)  # type: ignore[arg-type]
            if step:  # the second step has forgotten the first
                given.append(output)
    return given, calls


@pytest.mark.parametrize(("is_kept_whole", "calls"), [(False, 6), (True, 2)])
def test_zero_but_for_the_last(
    monkeypatch: pytest.MonkeyPatch, is_kept_whole: bool, calls: int
) -> None:
    given, found = reduce(monkeypatch, is_kept_whole)
    assert found == calls
    assert not given[0].any() and not given[1].any()
    exact = ((MICRO.double() / SCALE.unit).round() * SCALE.unit).sum(0) * 2
    assert torch.equal(given[2], exact[4:].float())
