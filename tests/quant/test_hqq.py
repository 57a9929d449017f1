"""Half-quadratic zeros against a slow reference, and against rounding to nearest."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from dist_peft.quant.affine import AffineCodec

WIDTHS = (2, 3, 4, 8)


def weight_of(seed: int, rows: int, columns: int, size: float = 0.02) -> Tensor:
    """Gaussian, with outliers."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * size
    return weight + weight * 6 * (torch.rand(rows, columns, generator=generator) > 0.98)


def errors(codec: AffineCodec, weight: Tensor) -> Tensor:
    """sum |w - w'|**0.75 of each group, in float64."""
    columns = weight.shape[1]
    off = (
        codec.dequantize_rows(codec.quantize_to_packed(weight), columns, torch.float32).double()
        - weight.double()
    )
    padded = torch.nn.functional.pad(off, (0, -columns % codec.group_size))
    return padded.abs().pow(0.75).unflatten(1, (-1, codec.group_size)).sum(-1)


def reference(group: list[float], scale: float, start: float, bits: int) -> float:
    """The zero of one group, in scalar float64; only the zero itself is rounded, to fp16."""
    steps = [w / scale for w in group]

    def look(zero: float) -> tuple[list[float], list[float], float]:
        codes = [min(max(float(np.rint(u + zero)), 0.0), 2.0**bits - 1) for u in steps]
        off = [u - (q - zero) for u, q in zip(steps, codes, strict=True)]
        return codes, off, sum(abs(r) ** 0.75 for r in off)

    best = start
    codes, off, least = look(start)
    for i in range(20):
        kept = [
            math.copysign(max(0.0, abs(r) - abs(r) ** -0.25 / (10 * 1.01**i)), r) if r else 0.0
            for r in off
        ]
        terms = [q - u + e for q, u, e in zip(codes, steps, kept, strict=True)]
        zero = float(np.float16(sum(terms) / len(terms)))
        codes, off, norm = look(zero)
        if norm < least:
            best, least = zero, norm
    return best


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("columns", [96, 75])
def test_equals_the_slow_reference(bits: int, columns: int) -> None:
    weight = weight_of(bits, 12, columns)
    codec, plain = AffineCodec(bits, 32, "hqq"), AffineCodec(bits, 32)
    _, scale, zero = codec.split_packed_rows(codec.quantize_to_packed(weight), columns)
    _, same, start = plain.split_packed_rows(plain.quantize_to_packed(weight), columns)
    assert torch.equal(scale, same)
    for row in range(12):
        for group in range(3):
            own = weight[row, 32 * group : 32 * group + 32].tolist()
            wanted = reference(own, float(scale[row, group]), float(start[row, group]), bits)
            # an error in float32 may turn a code at a tie
            assert abs(float(zero[row, group]) - wanted) <= 0.02


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("group_size", [8, 64])
def test_no_group_is_worse_than_rounded_to_nearest(bits: int, group_size: int) -> None:
    weight = weight_of(7, 64, 200)
    mine = errors(AffineCodec(bits, group_size, "hqq"), weight)
    plain = errors(AffineCodec(bits, group_size), weight)
    assert (mine <= plain * (1 + 1e-5)).all()
    assert mine.sum() < (1 if bits == 8 else 0.98) * plain.sum()


def test_the_size_of_the_weights_does_not_matter() -> None:
    codec = AffineCodec(3, 32, "hqq")
    weight = weight_of(3, 16, 64, size=1.0)
    codes, scale, zero = codec.split_packed_rows(codec.quantize_to_packed(weight), 64)
    small_codes, small_scale, small_zero = codec.split_packed_rows(
        codec.quantize_to_packed(weight / 128), 64
    )
    assert torch.equal(scale.float() / 128, small_scale.float())
    assert torch.equal(zero, small_zero) and torch.equal(codes, small_codes)


def test_zeros_are_fractions_and_a_constant_group_stays() -> None:
    codec = AffineCodec(4, 32, "hqq")
    _, _, zero = codec.split_packed_rows(codec.quantize_to_packed(weight_of(1, 8, 64)), 64)
    assert (zero != zero.round()).float().mean() > 0.5
    constant = torch.full((2, 32), 0.375)
    again = codec.dequantize_rows(codec.quantize_to_packed(constant), 32, torch.float32)
    torch.testing.assert_close(again, constant, rtol=1e-3, atol=0)  # the scale is fp16
    nothing = torch.zeros(2, 32)
    assert torch.equal(
        codec.dequantize_rows(codec.quantize_to_packed(nothing), 32, torch.float32), nothing
    )


def test_padding_does_not_count() -> None:
    codec = AffineCodec(3, 64, "hqq")
    weight = weight_of(5, 8, 40).abs()
    with_zeros = torch.cat((weight, torch.zeros(8, 24)), 1)
    own = codec.split_packed_rows(codec.quantize_to_packed(weight), 40).zero
    pulled = codec.split_packed_rows(codec.quantize_to_packed(with_zeros), 64).zero
    assert not torch.equal(own, pulled)
    assert (errors(codec, weight) <= errors(AffineCodec(3, 64), weight) * (1 + 1e-5)).all()
