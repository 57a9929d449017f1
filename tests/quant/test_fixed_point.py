import itertools
import math

import pytest
import torch
from torch import Tensor

from dist_peft.quant.fixed_point import FixedPointSum, SplitSum

CPU = torch.device("cpu")


def samples() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(5, 3, generator=generator) * 10.0**power for power in (0, -6, 3)]


def test_bits_do_not_depend_on_the_order() -> None:
    first = FixedPointSum.find_largest(samples()[0])
    totals = []
    for order in itertools.permutations(samples()):
        found = FixedPointSum((5, 3), first, 3, CPU)
        for sample in order:
            found.add_sample(sample)
        totals.append(found.to_float())
    assert all(torch.equal(total, totals[0]) for total in totals)
    exact = torch.stack([s.double() for s in samples()]).sum(0)
    torch.testing.assert_close(totals[0], exact, rtol=0, atol=1e-11)


def test_sums_of_ranks_are_added_as_integers() -> None:
    whole, left, right = (FixedPointSum((5, 3), 4.0, 3, CPU) for _ in range(3))
    for number, sample in enumerate(samples()):
        whole.add_sample(sample)
        (left if number == 1 else right).add_sample(sample)
    assert torch.equal(left.total + right.total, whole.total)


@pytest.mark.parametrize("value", [1.0e6, math.nan, math.inf, -math.inf])
def test_what_does_not_fit_is_told(value: float) -> None:
    found = FixedPointSum((2,), 1.0, 2, CPU)
    found.add_sample(torch.tensor([1.0, value]))
    assert found.largest > found.limit
    assert math.isinf(found.largest) is not math.isfinite(value)


def test_split_sums_do_not_depend_on_the_order() -> None:
    values = torch.randn(40, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values[:, 1] *= 1e6
    targets = torch.arange(40) % 3
    found = []
    for order in (torch.arange(40), torch.arange(40).flip(0), torch.randperm(40)):
        total = SplitSum(6)
        for row in order.split(7):
            total.add_rows(values[row], targets[row])
        found.append(total.to_floats())
    assert found[0] == found[1] == found[2]
    expected = torch.zeros(3, 2, dtype=torch.float64).index_add_(0, targets, values)
    as_tensor = torch.tensor(found[0], dtype=torch.float64).view(3, 2)
    torch.testing.assert_close(as_tensor, expected, rtol=0, atol=1e-8)


def test_split_sum_of_what_is_not_finite() -> None:
    total = SplitSum(2)
    total.add_rows(torch.tensor([[1.5], [torch.inf], [-0.25]]), torch.tensor([0, 1, 0]))
    first, second = total.to_floats()
    assert first == 1.25 and second != second


@pytest.mark.parametrize("value", [2.0**53, -1e20, 3e38, math.nan])
def test_split_sum_of_a_value_beyond_its_range_is_no_number(value: float) -> None:
    total = SplitSum(1)
    total.add_rows(torch.tensor([[value], [1.0]], dtype=torch.float64), torch.tensor([0, 0]))
    assert math.isnan(total.to_floats()[0])
    largest = SplitSum(1)
    largest.add_rows(torch.tensor([[2.0**53 - 1]], dtype=torch.float64), torch.tensor([0]))
    assert largest.to_floats() == [2.0**53 - 1]
