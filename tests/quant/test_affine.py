"""Affine integers against a scalar reference."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dist_peft.quant.affine import AffineCodec, AffineParts, dequantize_affine_parts

WIDTHS = (2, 3, 4, 8)


def reference(row: list[float], bits: int, group_size: int) -> list[tuple[list[int], float, float]]:
    """(codes, scale, zero) of each group, by the formula of the module, in scalar float32."""
    top, groups = 2**bits - 1, []
    for start in range(0, len(row), group_size):
        group = [np.float32(w) for w in row[start : start + group_size]]
        group += [np.float32(0)] * (group_size - len(group))
        low, high = min(np.float32(0), *group), max(np.float32(0), *group)
        exact = max((high - low) / np.float32(top), np.float32(2.0**-24))
        scale = np.float32(np.float16(exact if high > low else 1.0))
        zero = np.clip(np.rint(-low / scale), 0, top)
        codes = [int(np.clip(np.rint(w / scale) + zero, 0, top)) for w in group]
        groups.append((codes, float(scale), float(zero)))
    return groups


@settings(deadline=None, max_examples=80)
@given(
    bits=st.sampled_from(WIDTHS),
    group_size=st.sampled_from((8, 24, 32, 64)),
    row=st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=150),
)
def test_equals_the_scalar_formula(bits: int, group_size: int, row: list[float]) -> None:
    assert_equals_reference(bits, group_size, row)


@pytest.mark.parametrize("bits", WIDTHS)
def test_many_groups_equal_the_scalar_formula(bits: int) -> None:
    # rounding the scale to fp16 moves the zero of some of them
    torch.manual_seed(bits)
    assert_equals_reference(bits, 8, torch.randn(8 * 300).tolist())


def test_codes_halfway_between_round_to_even() -> None:
    scales = torch.linspace(0.01, 3, 500).half().float().unsqueeze(1)
    weight = torch.zeros(500, 24)
    weight[:, 0] = 15 * scales[:, 0]  # so that scale is exactly this, and zero is 0
    weight[:, 1:16] = (torch.arange(15) + 0.5) * scales
    codec = AffineCodec(4, 24)
    codes, scale, _ = codec.split_packed_rows(codec.quantize_to_packed(weight), 24)
    assert torch.equal(scale.float(), scales)
    assert (
        codes[:, 1:16].eq(torch.tensor([0, 2, 2, 4, 4, 6, 6, 8, 8, 10, 10, 12, 12, 14, 14])).all()
    )


def assert_equals_reference(bits: int, group_size: int, row: list[float]) -> None:
    codec = AffineCodec(bits, group_size)
    packed = codec.quantize_to_packed(torch.tensor([row]))
    codes, scale, zero = codec.split_packed_rows(packed, len(row))
    expected = reference(row, bits, group_size)
    assert codes[0].tolist() == [code for group in expected for code in group[0]]
    assert scale[0].tolist() == [group[1] for group in expected]
    assert zero[0].tolist() == [group[2] for group in expected]
    decoded = codec.dequantize_rows(packed, len(row), torch.float32)[0]
    values = [
        np.float32(code - zero) * np.float32(scale)
        for group, scale, zero in expected
        for code in group
    ]
    assert decoded.tolist() == [float(v) for v in values[: len(row)]]


def weight_of(seed: int, rows: int, in_features: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, in_features, generator=generator) * 0.05
    weight[0] = weight[0].abs()  # one-sided ranges
    weight[1] = -weight[1].abs() - 0.5
    return weight


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("group_size", [8, 64])
def test_error_bounds(bits: int, group_size: int) -> None:
    weight = weight_of(bits, 16, 256)
    codec = AffineCodec(bits, group_size)
    packed = codec.quantize_to_packed(weight)
    decoded = codec.dequantize_rows(packed, 256, torch.float32)
    _, scale, zero = (part.float().unsqueeze(-1) for part in codec.split_packed_rows(packed, 256))
    groups = weight.view(16, -1, group_size)
    error = (decoded.view_as(groups) - groups).abs()
    top = 2**bits - 1
    outside = torch.relu(groups - (top - zero) * scale) + torch.relu(-zero * scale - groups)
    assert (error <= scale / 2 * 1.00001 + outside).all()
    assert (outside <= scale * (0.5 + top / 2048) * 1.00001).all()


@pytest.mark.parametrize("bits", WIDTHS)
def test_zero_weights_decode_to_zero(bits: int) -> None:
    weight = weight_of(bits, 8, 128)
    weight[:, ::5] = 0
    codec = AffineCodec(bits, 32)
    decoded = codec.dequantize_rows(codec.quantize_to_packed(weight), 128, torch.float32)
    assert decoded[:, ::5].eq(0).all()


def test_a_group_of_zeros_has_scale_one() -> None:
    codec = AffineCodec(4, 8)
    codes, scale, zero = codec.split_packed_rows(codec.quantize_to_packed(torch.zeros(1, 16)), 16)
    assert codes.eq(0).all()
    assert scale.eq(1).all()
    assert zero.eq(0).all()


def test_the_sign_of_a_zero_does_not_depend_on_the_order_of_weights() -> None:
    """A minimum of 0.0 and -0.0 is either, by the order in which a device looks at them."""
    mixed = torch.tensor([0.0, -0.0]).repeat(32)
    rows = torch.stack((mixed, mixed.flip(0), mixed.abs(), -mixed.abs(), mixed.abs() + 1))
    codec = AffineCodec(4, 8)
    zero = codec.split_packed_rows(codec.quantize_to_packed(rows), 64).zero
    assert torch.equal(zero.view(torch.int16), torch.full_like(zero, -0.0).view(torch.int16))
    negative = codec.split_packed_rows(codec.quantize_to_packed(rows[:4] - 0.01), 64).zero
    assert not torch.signbit(negative).any()


@pytest.mark.parametrize("bits", WIDTHS)
def test_symmetric_groups_equal_the_scalar_formula(bits: int) -> None:
    row = [*torch.randn(8 * 60, generator=torch.Generator().manual_seed(bits)).tolist(), *[0.0] * 8]
    codec, half = AffineCodec(bits, 8, "absmax"), 2 ** (bits - 1)
    packed = codec.quantize_to_packed(torch.tensor([row]))
    codes, scale, zero = codec.split_packed_rows(packed, len(row))
    assert codec.has_integer_zeros and zero.eq(half).all()
    for group in range(len(row) // 8):
        weights = [np.float32(w) for w in row[8 * group : 8 * group + 8]]
        largest = max(abs(w) for w in weights)
        own = np.float32(np.float16(largest / np.float32(half - 1))) if largest else np.float32(1)
        wanted = [int(np.clip(np.rint(w / own) + half, 0, 2 * half - 1)) for w in weights]
        assert float(scale[0, group]) == float(own)
        assert codes[0, 8 * group : 8 * group + 8].tolist() == wanted
    decoded = codec.dequantize_rows(packed, len(row), torch.float32)
    assert not decoded[0, -8:].any()
    bound = scale.float().repeat_interleave(8, 1) * (0.5 + half / 2048)
    assert ((decoded - torch.tensor([row])).abs() <= bound * 1.00001).all()
    with pytest.raises(ValueError, match="need a scale beyond float16"):
        codec.quantize_to_packed(torch.full((1, 8), 2e7))
    with pytest.raises(ValueError, match="not finite"):
        codec.quantize_to_packed(torch.tensor([[torch.nan] * 8]))


@pytest.mark.parametrize("size", [1e-45, 1e-38, 1e-9, 2e-7, 1e-5])
def test_tiny_groups_lose_at_most_a_fp16_subnormal(size: float) -> None:
    weight = torch.linspace(-1, 1, 64).mul(size).view(1, 64)
    for bits in WIDTHS:
        codec = AffineCodec(bits, 64)
        decoded = codec.dequantize_rows(codec.quantize_to_packed(weight), 64, torch.float32)
        bound = max(2 * size / (2**bits - 1), 2.0**-24 * 2**bits)
        assert (decoded - weight).abs().max() <= bound


def test_a_range_beyond_fp16_scales_is_refused() -> None:
    weight = torch.zeros(1, 64)
    weight[0, 3] = 3e5
    with pytest.raises(ValueError, match=r"3e\+05 apart need a scale beyond float16 for 2 bits"):
        AffineCodec(2, 64).quantize_to_packed(weight)
    decoded = AffineCodec(8, 64).dequantize_rows(
        AffineCodec(8, 64).quantize_to_packed(weight), 64, torch.float32
    )
    assert abs(decoded[0, 3] - 3e5) < 200
    weight[0, 4] = -3.4e38
    with pytest.raises(ValueError, match="beyond float16"):
        AffineCodec(8, 64).quantize_to_packed(weight)


@settings(deadline=None, max_examples=40)
@given(
    bits=st.sampled_from(WIDTHS),
    group_size=st.sampled_from((8, 32, 40)),
    rows=st.integers(0, 4),
    in_features=st.integers(1, 130),
)
def test_split_and_join_are_inverse(
    bits: int, group_size: int, rows: int, in_features: int
) -> None:
    weight = torch.randn(rows, in_features)
    codec = AffineCodec(bits, group_size)
    packed = codec.quantize_to_packed(weight)
    parts = codec.split_packed_rows(packed, in_features)
    groups = -(-in_features // group_size)
    assert parts.codes.shape == (rows, groups * group_size)
    assert parts.scale.dtype == parts.zero.dtype == torch.float16
    assert torch.equal(codec.join_packed_rows(parts, in_features), packed)


@pytest.mark.parametrize("bits", WIDTHS)
def test_codes_are_one_dense_stream_at_the_start_of_the_row(bits: int) -> None:
    weight = torch.randn(2, 64)
    codec = AffineCodec(bits, 32)
    packed = codec.quantize_to_packed(weight)
    codes, scale, zero = codec.split_packed_rows(packed, 64)
    stream = sum(int(code) << (bits * i) for i, code in enumerate(codes[1]))
    assert bytes(packed[1, : 8 * bits].tolist()) == stream.to_bytes(8 * bits, "little")
    halves = packed[1, 8 * bits :].clone().view(torch.float16)
    assert torch.equal(halves, torch.cat((scale[1], zero[1])))


def test_payload_is_aligned_for_3_bits_in_small_groups() -> None:
    codec = AffineCodec(3, 8)
    assert codec.num_row_bytes(8) == 4 + 4
    packed = codec.quantize_to_packed(torch.linspace(-1, 1, 8).view(1, 8))
    assert packed[0, 3] == 0


def test_fractional_zeros_decode_as_written() -> None:
    codec = AffineCodec(4, 32)
    codes, scale, zero = codec.split_packed_rows(codec.quantize_to_packed(torch.randn(3, 64)), 64)
    moved = zero.float() + 0.375
    packed = codec.join_packed_rows(AffineParts(codes, scale, moved), 64)
    decoded = codec.dequantize_rows(packed, 64, torch.float32)
    stored, step = moved.half().float().unsqueeze(-1), scale.float().unsqueeze(-1)
    expected = (codes.view(3, 2, 32) - stored) * step
    assert torch.equal(decoded, expected.view(3, 64))


def test_join_refuses_what_does_not_fit() -> None:
    codec = AffineCodec(4, 32)
    codes, scale, zero = codec.split_packed_rows(codec.quantize_to_packed(torch.randn(3, 64)), 64)
    with pytest.raises(ValueError, match="codes, scale, zero of int4 are"):
        codec.join_packed_rows(AffineParts(codes[:, :32], scale, zero), 64)
    with pytest.raises(ValueError, match="code 16 does not fit into 4 bits"):
        codec.join_packed_rows(AffineParts(torch.full_like(codes, 16), scale, zero), 64)


def test_parameters_are_checked() -> None:
    with pytest.raises(ValueError, match="bits is 2, 3, 4 or 8, not 5"):
        AffineCodec(5)
    with pytest.raises(ValueError, match="group_size 12 is not"):
        AffineCodec(4, 12)


def test_parts_to_rows_by_hand() -> None:
    codes = torch.tensor([[1, 2, 3, 0]], dtype=torch.uint8)
    parts = AffineParts(codes, torch.tensor([[2.0, 0.5]]).half(), torch.tensor([[0.5, 1.0]]))
    assert dequantize_affine_parts(parts, 3).tolist() == [[1.0, 3.0, 1.0]]
