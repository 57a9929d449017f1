"""Integer rows with columns in another order, against plain indexing."""

import pickle

import pytest
import torch

from dist_peft.quant.affine import AffineCodec
from dist_peft.quant.ordered_columns import OrderedColumnsCodec


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_groups_follow_the_order(bits: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, inner = torch.randn(9, 96, generator=generator), AffineCodec(bits, 32)
    order = torch.randperm(96, generator=generator)
    codec = OrderedColumnsCodec.from_order(inner, order)
    packed = codec.quantize_to_packed(weight)
    assert packed.shape == (9, codec.num_row_bytes(96))
    assert torch.equal(packed, inner.quantize_to_packed(weight[:, order]))
    assert torch.equal(packed[2:5], codec.quantize_to_packed(weight[2:5]))
    wanted = torch.empty(9, 96)
    wanted[:, order] = inner.dequantize_rows(packed, 96, torch.float32)
    assert torch.equal(codec.dequantize_rows(packed, 96, torch.float32), wanted)
    # codes in the weight's order, scales of the sorted groups
    unsorted = packed.clone()
    codes = inner.quantize_to_packed(wanted)
    assert codes.shape == unsorted.shape
    groups = codec.list_column_groups()
    assert torch.equal(groups[order], torch.arange(96, dtype=torch.int32) // 32)
    parts = codec.split_packed_rows(packed, 96)
    scale, zero = (p.float()[:, groups.long()] for p in (parts.scale, parts.zero))
    assert torch.equal((parts.codes.float() - zero) * scale, wanted)
    assert pickle.loads(pickle.dumps(codec)) == codec
    assert codec != OrderedColumnsCodec.from_order(inner, order.flip(0))
    assert "96 columns" in repr(codec) and "act-order" in codec.describe_storage()
    assert torch.equal(codec.read_statistics(packed, 96), inner.read_statistics(packed, 96))


def test_columns_are_sorted_once() -> None:
    """``sort_columns`` of rows whose codes are in the weight's order."""
    order = torch.tensor([*range(8, 16), *range(8), *range(16, 32)])
    inner = AffineCodec(4, 8)
    codec = OrderedColumnsCodec.from_order(inner, order)
    packed = inner.quantize_to_packed(torch.randn(3, 32))
    found = codec.sort_columns(packed, 32)
    assert torch.equal(found[:, :4], packed[:, 4:8]) and torch.equal(found[:, 4:8], packed[:, :4])
    assert torch.equal(found[:, 8:], packed[:, 8:])
