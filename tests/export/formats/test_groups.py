"""Affine groups with float biases."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dist_peft.export.formats.groups import (
    BiasGroups,
    convert_to_bias_groups,
    pack_code_words,
    quantize_bias_groups,
)
from dist_peft.quant.affine import AffineCodec, AffineParts


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rounding_to_nearest(bits: int, dtype: torch.dtype) -> None:
    rows = torch.randn(5, 96, generator=torch.Generator().manual_seed(bits))
    groups = quantize_bias_groups(rows, bits, 32, dtype)
    assert groups.scale.dtype == groups.bias.dtype == dtype and groups.scale.shape == (5, 3)
    assert int(groups.codes.max()) <= 2**bits - 1
    step = groups.scale.float().repeat_interleave(32, 1)
    ends = 2**bits * torch.finfo(dtype).eps + 0.5  # a rounded scale can leave the ends outside
    ends += groups.bias.abs().float().repeat_interleave(32, 1) * torch.finfo(dtype).eps / step
    assert bool(((groups.dequantize() - rows).abs() <= ends * step * 1.001).all())


def test_constant_and_zero_groups_are_exact() -> None:
    rows = torch.cat((torch.full((1, 32), -0.5), torch.zeros(1, 32)))
    assert torch.equal(quantize_bias_groups(rows, 4, 32, torch.float16).dequantize(), rows)


@pytest.mark.parametrize("group_size", [32, 16, 8])
def test_regroup_keeps_every_number(group_size: int) -> None:
    codec = AffineCodec(3, 32)
    rows = torch.randn(4, 80, generator=torch.Generator().manual_seed(1))  # a padded last group
    parts = codec.split_packed_rows(codec.quantize_to_packed(rows), 80)
    moved = parts._replace(zero=parts.zero.float() + torch.randn(4, 3))
    columns = 80 if group_size < 32 else 64
    groups = convert_to_bias_groups(moved, columns, group_size, torch.float32)
    scale = moved.scale.float().repeat_interleave(32, 1)[:, :columns]
    zero = moved.zero.repeat_interleave(32, 1)[:, :columns]
    wanted = (moved.codes[:, :columns].float() - zero) * scale
    torch.testing.assert_close(groups.dequantize(), wanted, rtol=1e-6, atol=1e-6)
    assert groups.codes.shape == (4, columns)


@given(bits=st.sampled_from([2, 3, 4, 8]), words=st.integers(1, 3), seed=st.integers(0, 9))
def test_words_are_a_dense_bit_stream(bits: int, words: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 2**bits, (2, 32 * words), dtype=np.uint8)
    packed = pack_code_words(torch.from_numpy(codes), bits, torch.int32)
    assert packed.shape == (2, words * bits) and packed.dtype == torch.int32
    for row, found in zip(codes, packed, strict=True):
        stream = sum(int(code) << (bits * i) for i, code in enumerate(row))
        for i, word in enumerate(found.tolist()):
            assert word & 0xFFFFFFFF == stream >> (32 * i) & 0xFFFFFFFF


def test_words_of_a_single_row_with_the_strides_of_a_column() -> None:
    codes = torch.arange(64, dtype=torch.uint8)[:, None].T
    assert codes.is_contiguous() and codes.stride() == (1, 1)
    expected = pack_code_words(codes.repeat(2, 1), 8, torch.int32)[:1]
    assert torch.equal(pack_code_words(codes, 8, torch.int32), expected)


def test_decoded_by_hand() -> None:
    parts = AffineParts(torch.tensor([[0, 1, 2, 3]] * 1, dtype=torch.uint8), None, None)
    groups = BiasGroups(parts.codes, torch.tensor([[2.0, 3.0]]), torch.tensor([[-1.0, 1.0]]))
    assert groups.dequantize().tolist() == [[-1.0, 1.0, 7.0, 10.0]]
