"""GPTQ against a plain float64 loop, and what makes it independent of ranks."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dist_peft.quant import gptq
from dist_peft.quant.affine import AffineCodec, AffineParts
from dist_peft.quant.gptq import (
    HessianFactor,
    HessianSum,
    compute_gram,
    factorize_hessian,
    find_largest_entry,
    solve_weight_rows,
)

CPU = torch.device("cpu")
WIDTHS = (2, 3, 4, 8)


def inputs(columns: int, samples: int = 3, seed: int = 0) -> list[Tensor]:
    """Correlated activations of very different size, the last column never active."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5
    size = torch.rand(columns, generator=generator).mul(2).exp()
    size[-1] = 0
    made = [
        torch.randn(1, 2 * columns, columns, generator=generator) @ (mix + 0.3 * torch.eye(columns))
        for _ in range(samples)
    ]
    return [x * size for x in made]


def weight_of(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def hessian_of(columns: int) -> Tensor:
    return sum(
        (compute_gram(x).double() for x in inputs(columns)), torch.zeros(columns, columns).double()
    )


def cost(codec: AffineCodec, weight: Tensor, packed: Tensor, hessian: Tensor) -> float:
    """tr(E H E^T): squared error of the layer's output on the calibration inputs."""
    off = codec.dequantize_rows(packed, weight.shape[1], torch.float32).double() - weight.double()
    return float(((off @ hessian) * off).sum())


def reference(weight: Tensor, hessian: Tensor, codec: AffineCodec) -> Tensor:
    """Column by column, in float64, H inverted again after each column (Optimal Brain Surgeon)."""
    rows, columns = weight.shape
    size = codec.group_size
    padded = -(-columns // size) * size
    w = torch.zeros(rows, padded, dtype=torch.float64)
    w[:, :columns] = weight
    h = torch.zeros(padded, padded, dtype=torch.float64)
    h[:columns, :columns] = hessian
    h += torch.eye(padded) * 0.01 * hessian.diagonal().mean()
    active = [float(hessian[i, i]) if i < columns else -1.0 for i in range(padded)]
    groups = [range(start, start + size) for start in range(0, padded, size)]
    groups.sort(key=lambda g: -max(active[i] for i in g))
    codes = torch.zeros(rows, padded, dtype=torch.uint8)
    scale = torch.zeros(rows, padded // size)
    zero = torch.zeros_like(scale)
    left = list(range(padded))
    for group in groups:
        number = group[0] // size
        own = w[:, group[0] : group[-1] + 1].float().unsqueeze(1)
        found = codec.compute_scale_and_zero(own)
        scale[:, number], zero[:, number] = (part[:, 0].float() for part in found)
        s, z = scale[:, number].double(), zero[:, number].double()
        for i in sorted(group, key=lambda i: -active[i]):
            code = (torch.round(w[:, i] / s) + z).clamp(0, 2**codec.bits - 1)
            codes[:, i] = code.to(torch.uint8)
            error = w[:, i] - (code - z) * s
            inverse = torch.linalg.inv(h[left][:, left])
            row = inverse[left.index(i)]
            w[:, left] -= error.unsqueeze(1) * row / row[left.index(i)]
            left.remove(i)
    return codec.join_packed_rows(AffineParts(codes, scale, zero), columns)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("columns", [64, 52])
def test_equals_the_float64_reference(bits: int, columns: int) -> None:
    codec = AffineCodec(bits, 16)
    weight, hessian = weight_of(24, columns), hessian_of(columns)
    packed = solve_weight_rows(weight, factorize_hessian(hessian, 16), codec)
    expected = reference(weight, hessian, codec)
    mine, other = (
        codec.split_packed_rows(packed, columns),
        codec.split_packed_rows(expected, columns),
    )
    # a tie that float32 breaks the other way changes the rest of its row
    rows = [
        all(torch.equal(a[r], b[r]) for a, b in zip(mine, other, strict=True)) for r in range(24)
    ]
    assert sum(rows) >= 23
    close = cost(codec, weight, packed, hessian) / cost(codec, weight, expected, hessian)
    assert 0.98 < close < 1.02


@pytest.mark.parametrize("columns", [32, 20])
def test_a_row_may_be_one_group(columns: int) -> None:
    codec, hessian = AffineCodec(4, 32), hessian_of(columns)
    weight = weight_of(24, columns)
    packed = solve_weight_rows(weight, factorize_hessian(hessian, 32), codec)
    assert packed.shape == (24, codec.num_row_bytes(columns))
    assert cost(codec, weight, packed, hessian) < cost(
        codec, weight, codec.quantize_to_packed(weight), hessian
    )


@pytest.mark.parametrize("bits", WIDTHS)
def test_output_error_is_below_that_of_rounding_to_nearest(bits: int) -> None:
    codec = AffineCodec(bits, 32)
    weight, hessian = weight_of(48, 150), hessian_of(150)
    solved = cost(
        codec, weight, solve_weight_rows(weight, factorize_hessian(hessian, 32), codec), hessian
    )
    rounded = cost(codec, weight, codec.quantize_to_packed(weight), hessian)
    assert solved < 0.8 * rounded
    assert (
        codec.split_packed_rows(
            solve_weight_rows(weight, factorize_hessian(hessian, 32), codec), 150
        )
        .zero.frac()
        .eq(0)
        .all()
    )


@settings(deadline=None, max_examples=40)
@given(data=st.data(), rows=st.integers(0, 40), bits=st.sampled_from(WIDTHS))
def test_rows_are_independent_bit_for_bit(data: st.DataObject, rows: int, bits: int) -> None:
    start = data.draw(st.integers(0, rows))
    stop = data.draw(st.integers(start, rows))
    codec, factor = AffineCodec(bits, 16), FACTOR
    weight = weight_of(40, 52)[:rows]
    whole = solve_weight_rows(weight, factor, codec)
    assert torch.equal(whole[start:stop], solve_weight_rows(weight[start:stop], factor, codec))


FACTOR = factorize_hessian(hessian_of(52), 16)


def test_chunks_and_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    codec, weight = AffineCodec(3, 16), weight_of(700, 52)
    whole = solve_weight_rows(weight, FACTOR, codec)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(solve_weight_rows(weight, FACTOR, codec), whole)
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setattr(gptq, "CHUNK_ELEMENTS", 64 * 7)
    assert torch.equal(solve_weight_rows(weight, FACTOR, codec), whole)


def test_without_correlations_it_is_rounding_to_nearest() -> None:
    codec, weight = AffineCodec(4, 16), weight_of(9, 52)
    for hessian in (torch.eye(52).double(), torch.zeros(52, 52).double()):
        assert torch.equal(
            solve_weight_rows(weight, factorize_hessian(hessian, 16), codec),
            codec.quantize_to_packed(weight),
        )


def test_order_keeps_groups_together() -> None:
    diagonal = torch.tensor([1, 9, 2, 2, 5, 1, 1, 7, 3, 4], dtype=torch.float64)
    order = factorize_hessian(torch.diag(diagonal), 4).order.tolist()
    assert order == [1, 2, 3, 0, 7, 4, 5, 6, 9, 8, 10, 11]


def test_factor_is_that_of_the_inverse() -> None:
    hessian = hessian_of(48)
    factor = factorize_hessian(hessian, 16)
    damped = hessian + torch.eye(48) * 0.01 * hessian.diagonal().mean()
    inverse = torch.linalg.inv(damped[factor.order][:, factor.order])
    upper = torch.linalg.cholesky(inverse, upper=True)
    expected = upper / upper.diagonal().unsqueeze(1)
    torch.testing.assert_close(factor.upper.double(), expected, rtol=1e-5, atol=1e-6)


def test_damping_grows_until_there_is_a_factor() -> None:
    hessian = torch.eye(16).double()
    hessian[0, 1] = hessian[1, 0] = 1.05  # an eigenvalue of -0.05
    factor = factorize_hessian(hessian, 8)
    assert isinstance(factor, HessianFactor) and factor.upper.isfinite().all()
    hessian[0, 1] = hessian[1, 0] = 5
    with pytest.raises(ValueError, match="no Cholesky factor, even with damping 1"):
        factorize_hessian(hessian, 8)


@settings(deadline=None, max_examples=30)
@given(order=st.permutations(range(6)), cut=st.integers(0, 6))
def test_sums_do_not_depend_on_order_or_ranks(order: list[int], cut: int) -> None:
    samples = [compute_gram(x) * 3.0**i for i, x in enumerate(inputs(12, 6))]
    first = find_largest_entry(samples[0])
    wanted = HessianSum(12, first, 6, CPU)
    for sample in samples:
        wanted.add_sample(sample)
    one, other = HessianSum(12, first, 6, CPU), HessianSum(12, first, 6, CPU)
    for position, number in enumerate(order):
        (one if position < cut else other).add_sample(samples[number])
    assert torch.equal(one.total + other.total, wanted.total)
    exact = sum((s.double() for s in samples), torch.zeros(12, 12).double())
    ratio = wanted.mean_hessian()[0, 0] / exact[0, 0]
    torch.testing.assert_close(wanted.mean_hessian() / ratio, exact, rtol=1e-9, atol=1e-9)


def test_a_sample_beyond_the_headroom_is_told_not_added() -> None:
    total = HessianSum(2, 1.0, 4, CPU)
    total.add_sample(torch.eye(2) * 2.0**16)
    assert total.largest <= total.limit
    total.add_sample(torch.eye(2) * 2.0**18)
    assert total.largest > total.limit
    assert int(total.total.abs().max()) < 2**62


def test_what_is_not_finite_is_refused() -> None:
    for wrong in (math.nan, math.inf):
        assert find_largest_entry(compute_gram(torch.tensor([[1.0, wrong]]))) == math.inf
    weight = weight_of(3, 52)
    weight[1, 3] = float("inf")
    with pytest.raises(ValueError, match="not finite"):
        solve_weight_rows(weight, FACTOR, AffineCodec(4, 16))
