"""Codes on kept scales, against all codes that a row could have, decoded one after the other."""

import pytest
import torch
from torch import Tensor

from dist_peft.quant.affine import AffineCodec
from dist_peft.quant.codec import Codec
from dist_peft.quant.fp4 import Fp4Codec
from dist_peft.quant.fp8 import Fp8Codec
from dist_peft.quant.kept_grid import count_changed_codes, quantize_on_grid
from dist_peft.quant.llm_int8 import LlmInt8Codec
from dist_peft.quant.mxfp4 import Mxfp4Codec
from dist_peft.quant.nf4 import Nf4Codec
from dist_peft.quant.nvfp4 import Nvfp4Codec
from dist_peft.quant.ordered_columns import OrderedColumnsCodec
from dist_peft.quant.ordered_stacks import OrderedStackCodec
from dist_peft.quant.pack import pack_bits, unpack_bits

ROWS, IN = 5, 64
ORDERS = [torch.randperm(IN, generator=torch.Generator().manual_seed(n)) for n in (0, 1)]
CODECS: list[Codec] = [
    *(AffineCodec(bits, 16, solver) for bits in (2, 3, 4, 8) for solver in ("rtn", "hqq")),
    OrderedColumnsCodec.from_order(AffineCodec(4, 16), ORDERS[0]),
    Nf4Codec(32, double_quant=False),
    Nf4Codec(8, double_quant=True),
    Fp4Codec(32),
    Fp8Codec(24),
    Fp8Codec(2**16),
    LlmInt8Codec(),
    Mxfp4Codec(),
    Nvfp4Codec(),
]


def decode_all_codes(codec: Codec, kept: Tensor) -> Tensor:
    """What each code would be in each place, ``float32 [codes, rows, in]``; NaN: no code."""
    assert codec.grid_rows is not None
    bits = codec.grid_rows.code_bits
    found = []
    for code in range(2**bits):
        packed = kept.clone()
        codes = torch.full((ROWS, IN), code, dtype=torch.uint8)
        packed[:, : IN * bits // 8] = pack_bits(codes, bits)
        found.append(codec.dequantize_rows(packed, IN, torch.float32))
    if codec.int8_rows is not None:
        found[128].fill_(torch.nan)  # the library has no -128
    return torch.stack(found)


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.describe_storage())
def test_the_nearest_code_is_taken_and_the_grid_stays(codec: Codec) -> None:
    generator, grid = torch.Generator().manual_seed(2), codec.grid_rows
    assert grid is not None
    kept = codec.quantize_to_packed(torch.randn(ROWS, IN, generator=generator))
    decoded = codec.dequantize_rows(kept, IN, torch.float32)
    assert torch.equal(quantize_on_grid(decoded, kept, grid, IN), kept)
    values = decoded + 0.3 * torch.randn(ROWS, IN, generator=generator)
    found = quantize_on_grid(values, kept, grid, IN)
    assert torch.equal(quantize_on_grid(values[2:4], kept[2:4], grid, IN), found[2:4])
    size = IN * grid.code_bits // 8
    assert torch.equal(found[:, size:], kept[:, size:])
    error = (codec.dequantize_rows(found, IN, torch.float32) - values).abs()
    least = (decode_all_codes(codec, kept) - values).abs().nan_to_num(torch.inf).amin(0)
    torch.testing.assert_close(error, least, rtol=1e-5, atol=1e-6)
    codes = [unpack_bits(rows[:, :size], grid.code_bits) for rows in (found, kept)]
    moved = int((codes[0] != codes[1]).sum())
    assert count_changed_codes(found, kept, grid, IN) == moved > 10


def test_groups_without_a_scale_and_the_padding_keep_their_codes() -> None:
    """Rows of 42 columns: 6 of the last group are padding. A negative scale of a file is used."""
    codec = AffineCodec(4, 16)
    kept = codec.quantize_to_packed(torch.randn(ROWS, 42))
    parts = codec.split_packed_rows(kept, 42)
    parts.scale[1, 1] = 0
    parts.scale[2, 0] *= -1
    kept = codec.join_packed_rows(parts, 42)
    decoded = codec.dequantize_rows(kept, 42, torch.float32)
    assert torch.equal(quantize_on_grid(decoded, kept, codec, 42), kept)
    found = codec.split_packed_rows(quantize_on_grid(decoded + 1, kept, codec, 42), 42)
    assert torch.equal(found.codes[1, 16:32], parts.codes[1, 16:32])
    assert torch.equal(found.codes[:, 42:], parts.codes[:, 42:])
    assert bool((found.codes[2, :16] <= parts.codes[2, :16]).all())
    nvfp4 = Nvfp4Codec()
    kept = nvfp4.quantize_to_packed(torch.randn(ROWS, IN))
    kept[3, IN // 2] = 0  # an E4M3 scale
    found_rows = quantize_on_grid(torch.ones(ROWS, IN), kept, nvfp4, IN)
    assert torch.equal(found_rows[3, :8], kept[3, :8])
    assert not torch.equal(found_rows[3, 8:16], kept[3, 8:16])


def test_a_zero_keeps_its_sign() -> None:
    for codec, negative in ((Mxfp4Codec(), 0x88), (Fp4Codec(32), 0x88), (Fp8Codec(32), 0x80)):
        kept = codec.quantize_to_packed(torch.ones(1, 32))
        kept[:, :4] = negative
        decoded = codec.dequantize_rows(kept, 32, torch.float32) + 0.0  # no -0.0
        assert torch.equal(quantize_on_grid(decoded, kept, codec.grid_rows, 32), kept)


def test_rows_of_experts_move_in_their_own_orders() -> None:
    inner = AffineCodec(4, 16)
    codec = OrderedStackCodec.from_orders(inner, ORDERS)
    single = [OrderedColumnsCodec.from_order(inner, order) for order in ORDERS]
    kept = [one.quantize_to_packed(torch.randn(ROWS, IN)) for one in single]
    values = [torch.randn(ROWS, IN) for _ in single]
    wanted = [
        codec.mark_rows(quantize_on_grid(v, k, one, IN), number)
        for number, (one, k, v) in enumerate(zip(single, kept, values, strict=True))
    ]
    marked = torch.cat([codec.mark_rows(k, number) for number, k in enumerate(kept)])
    found = quantize_on_grid(torch.cat(values), marked, codec, IN)
    assert torch.equal(found, torch.cat(wanted))


def test_values_that_are_not_finite_are_refused() -> None:
    codec = AffineCodec(4, 16)
    kept = codec.quantize_to_packed(torch.ones(ROWS, IN))
    values = torch.ones(ROWS, IN)
    values[3, 7] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinity in row 3"):
        quantize_on_grid(values, kept, codec, IN)
