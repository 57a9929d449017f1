"""Integer sums of gradients and the exact norm, against float64 and in every order."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from dist_peft.core.config.run import TrainConfig
from dist_peft.core.errors import RunFailure
from dist_peft.engine.exact_gradients import (
    FixedPointGradients,
    GradientRange,
    GradientScale,
    compute_exact_norm,
)
from tests.support.thread_ranks import run_ranks

CPU = torch.device("cpu")
SCALE = GradientScale.from_config(TrainConfig(global_batch=6, micro_batch=1))
SHAPES = ((7, 5), (11,), (1, 3))
SIZES = (35, 11, 3)


def micro_batches(seed: int = 0, count: int = 6) -> list[list[Tensor]]:
    """Gradients over many powers of two, in which the order of float sums is seen."""
    generator = torch.Generator().manual_seed(seed)
    powers = torch.arange(count) * 3 - 12
    return [
        [torch.randn(shape, generator=generator) * 2.0 ** float(power) for shape in SHAPES]
        for power in powers
    ]


def sums_of(parts: list[list[Tensor]]) -> list[Tensor]:
    made = FixedPointGradients(SIZES, SCALE, CPU)
    for part in parts:
        made.add_micro_batch(part)
    found = made.take_sums(None)
    return [value for value in found if value is not None]


def test_sums_are_the_same_in_every_order_and_right() -> None:
    parts = micro_batches()
    expected = sums_of(parts)
    floats = set()
    for order in list(itertools.permutations(range(6)))[::97]:
        found = sums_of([parts[number] for number in order])
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        added = torch.zeros(SHAPES[0])
        for number in order:
            added += parts[number][0]
        floats.add(added.numpy().tobytes())
    assert len(floats) > 1  # what the integers are for
    for number, shape in enumerate(SHAPES):
        exact = sum((part[number].double() for part in parts), torch.zeros(shape).double())
        assert torch.equal(expected[number].view(shape), exact.float())


def test_ranks_add_integers() -> None:
    parts = micro_batches()
    expected = sums_of(parts)

    def work(rank: int, reduce_sum: object, size: int) -> list[Tensor | None]:
        made = FixedPointGradients(SIZES, SCALE, CPU)
        for part in parts[rank::size]:
            made.add_micro_batch(part)
        return made.take_sums(lambda total, op: total.copy_(reduce_sum(total)))  # type: ignore

    for size in (2, 3):
        for sums in run_ranks(size, lambda rank, reduce, n=size: work(rank, reduce, n)):
            assert all(torch.equal(a, b) for a, b in zip(sums, expected, strict=True))


def test_a_step_forgets_the_one_before_and_knows_absent_gradients() -> None:
    made = FixedPointGradients(SIZES, SCALE, CPU)
    made.add_micro_batch(micro_batches()[5])
    made.take_sums(None)
    made.add_micro_batch([None, torch.full((11,), 0.5), None])
    made.add_micro_batch([None, torch.full((11,), 0.25), None])
    first, second, third = made.take_sums(None)
    assert first is None and third is None and second is not None
    assert torch.equal(second, torch.full((11,), 0.75))


def test_large_tensors_are_taken_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = sums_of(micro_batches())
    norm = compute_exact_norm(expected, 0.0, SCALE, None)
    for name in ("_CHUNK", "_CPU_CHUNK"):
        monkeypatch.setattr(f"dist_peft.engine.exact_gradients.{name}", 8)
    found = sums_of(micro_batches())
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert compute_exact_norm(expected, 0.0, SCALE, None) == norm


def test_unit_follows_epsilon() -> None:
    for eps in (1e-8, 1e-5, 3e-7, 1e-12):
        scale = GradientScale.from_config(TrainConfig(eps=eps, global_batch=9, micro_batch=2))
        assert scale.unit <= max(eps * 2**-20, 2**-50) and scale.micro_batches == 5
        assert scale.limit * 5 / scale.unit == 2**62
    assert "unit 2^-47, 6 micro-batches" in SCALE.describe()


@pytest.mark.parametrize("cut", [1, 3, 16, 40])
@pytest.mark.parametrize("power", [-100, -20, 0, 60])
def test_norm_does_not_depend_on_the_cut(cut: int, power: int) -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(1)) * 2.0**power
    whole = compute_exact_norm([values], 0.0, SCALE, None)
    assert whole == pytest.approx(float(values.double().norm()), rel=1e-12)
    assert compute_exact_norm(values.split(cut), 0.0, SCALE, None) == whole
    assert compute_exact_norm([values.flip(0)], 0.0, SCALE, None) == whole


def test_norm_over_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    expected = compute_exact_norm([values], 0.0, SCALE, None)
    parts = values.tensor_split(3)
    tops = torch.tensor([[float(p.abs().max()), 0.0] for p in parts], dtype=torch.float64)
    sums: list[Tensor] = []

    def note(total: Tensor, op: object) -> None:
        if total.dtype == torch.float64:
            total.copy_(tops.amax(0))
        else:
            sums.append(total.clone())

    for part in parts:
        compute_exact_norm([part], 0.0, SCALE, note)
    whole = torch.stack(sums).sum(0)

    def answer(total: Tensor, op: object) -> None:
        total.copy_(tops.amax(0) if total.dtype == torch.float64 else whole)

    assert compute_exact_norm([parts[0]], 0.0, SCALE, answer) == expected


def test_norm_of_nothing_and_of_what_is_not_finite() -> None:
    zero = torch.zeros(3)
    assert compute_exact_norm([], 0.0, SCALE, None) == 0
    assert compute_exact_norm([zero], 0.0, SCALE, None) == 0
    assert math.isnan(compute_exact_norm([zero], math.inf, SCALE, None))
    assert math.isnan(compute_exact_norm([torch.tensor([1.0, math.nan])], 0.0, SCALE, None))


def test_overflow_is_refused() -> None:
    compute_exact_norm([torch.ones(2)], SCALE.limit, SCALE, None)
    with pytest.raises(RunFailure, match=r"has the value .*no update was made.*train\.eps"):
        compute_exact_norm([torch.ones(2)], SCALE.limit * 1.01, SCALE, None)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_range_sees_what_is_not_finite(value: float) -> None:
    found = GradientRange(CPU)
    found.note_values(torch.tensor([1.0, -3.0]))
    found.note_values(torch.zeros(0))
    assert found.take_largest() == 3 and found.take_largest() == 0
    found.note_values(torch.tensor([1.0, value]))
    found.note_values(torch.tensor([2.0]))
    assert found.take_largest() == math.inf
