"""Rows that name the order of their columns, against plain indexing."""

import pickle

import pytest
import torch

from dist_peft.quant.affine import AffineCodec
from dist_peft.quant.ordered_columns import OrderedColumnsCodec
from dist_peft.quant.ordered_stacks import OrderedStackCodec

IN, OUT = 96, 5


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_any_rows_decode_in_their_own_order(bits: int) -> None:
    """As each expert's own codec of one order does: all rows, some of them, in any mixture."""
    generator, inner = torch.Generator().manual_seed(0), AffineCodec(bits, 32)
    orders = [torch.randperm(IN, generator=generator) for _ in range(3)]
    codec = OrderedStackCodec.from_orders(inner, orders)
    packed, wanted = [], []
    for number, order in enumerate(orders):
        single = OrderedColumnsCodec.from_order(inner, order)
        rows = single.quantize_to_packed(torch.randn(OUT, IN, generator=generator))
        packed.append(codec.mark_rows(rows, number))
        wanted.append(single.dequantize_rows(rows, IN, torch.float32))
    whole, dense = torch.cat(packed), torch.cat(wanted)
    assert whole.shape == (3 * OUT, codec.num_row_bytes(IN))
    assert torch.equal(codec.dequantize_rows(whole, IN, torch.float32), dense)
    mixed = torch.randperm(3 * OUT, generator=generator)
    for rows in (mixed, mixed[:4], mixed[:0]):
        assert torch.equal(codec.dequantize_rows(whole[rows], IN, torch.float32), dense[rows])
    half = codec.dequantize_rows(whole, IN, torch.bfloat16)
    assert torch.equal(half, dense.bfloat16())
    groups = [codec.list_column_groups(rows) for rows in packed]
    for number, (order, found) in enumerate(zip(orders, groups, strict=True)):
        assert torch.equal(found[order], torch.arange(IN, dtype=torch.int32) // 32), number
    parts = codec.split_packed_rows(whole, IN)
    by_column = torch.cat([g.long().expand(OUT, IN) for g in groups])
    scale, zero = (part.float().gather(1, by_column) for part in (parts.scale, parts.zero))
    assert torch.equal((parts.codes.float() - zero) * scale, dense)
    statistics = inner.read_statistics(whole[:, :-4].contiguous(), IN)
    assert torch.equal(codec.read_statistics(whole, IN), statistics)


def test_the_codec_is_a_value() -> None:
    inner, orders = AffineCodec(4, 32), [torch.arange(IN), torch.arange(IN).flip(0)]
    codec = OrderedStackCodec.from_orders(inner, orders)
    assert pickle.loads(pickle.dumps(codec)) == codec and hash(codec) == hash(codec)
    assert codec != OrderedStackCodec.from_orders(inner, orders[::-1])
    assert "2 orders of 96" in repr(codec) and "act-order of each" in codec.describe_storage()
    assert codec.name == "int4" and codec.affine_rows is None
    with pytest.raises(ValueError, match="read and not encoded"):
        codec.quantize_to_packed(torch.randn(2, IN))
    with pytest.raises(ValueError, match=r"uint8 \[rows, 64\]"):
        codec.dequantize_rows(torch.zeros(1, 60, dtype=torch.uint8), IN, torch.float32)
