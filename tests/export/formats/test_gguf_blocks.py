"""Blocks of ggml, decoded by the gguf package."""

import gguf
import numpy as np
import pytest
import torch

from dist_peft.core.errors import UserError
from dist_peft.export.formats.gguf_blocks import (
    pack_mxfp4_blocks,
    pack_q4_1_blocks,
    pack_q8_0_blocks,
    pack_symmetric_codes,
)
from dist_peft.export.formats.groups import convert_to_bias_groups, quantize_bias_groups
from dist_peft.quant.affine import AffineCodec
from dist_peft.quant.mxfp4 import Mxfp4Codec


def test_mxfp4_is_moved_and_not_rounded() -> None:
    rows = torch.randn(5, 96, generator=torch.Generator().manual_seed(4))
    rows[1, 32:64], rows[2] = 0, rows[2] * 1e-30
    packed = Mxfp4Codec().quantize_to_packed(rows)
    stored = pack_mxfp4_blocks(packed, 96)
    assert stored.shape == (5, 3 * 17)
    found = gguf.dequantize(stored.numpy(), gguf.GGMLQuantizationType.MXFP4)
    assert np.array_equal(found, Mxfp4Codec().dequantize_rows(packed, 96, torch.float32).numpy())
    codes, exponents = Mxfp4Codec().split_packed_rows(packed, 96)
    for row in range(5):  # by hand: byte j of a block has codes j and j + 16
        own = [(int(codes[row, i // 2]) >> (4 * (i % 2))) & 15 for i in range(96)]
        wanted = []
        for block in range(3):
            part = own[block * 32 : block * 32 + 32]
            wanted += [
                int(exponents[row, block]),
                *(part[j] + 16 * part[j + 16] for j in range(16)),
            ]
        assert stored[row].tolist() == wanted


def test_blocks_equal_the_packages_own() -> None:
    rows = torch.randn(3, 96, generator=torch.Generator().manual_seed(4))
    found = pack_q8_0_blocks(rows).numpy()
    assert np.array_equal(found, gguf.quantize(rows.numpy(), gguf.GGMLQuantizationType.Q8_0))
    groups = quantize_bias_groups(rows, 4, 32, torch.float16)
    values = gguf.dequantize(pack_q4_1_blocks(groups).numpy(), gguf.GGMLQuantizationType.Q4_1)
    np.testing.assert_allclose(values, groups.dequantize().numpy(), rtol=1e-6, atol=1e-6)
    assert np.array_equal(pack_q8_0_blocks(torch.zeros(1, 32)).numpy(), np.zeros((1, 34), np.uint8))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [32, 64])
def test_blocks_hold_symmetric_codes_without_rounding(bits: int, group: int) -> None:
    """The gguf package's values are the codec's, bit for bit: ``scale * zero`` is exact."""
    codec = AffineCodec(bits, group, "absmax")
    rows = torch.randn(3, 96, generator=torch.Generator().manual_seed(4))
    packed = codec.quantize_to_packed(rows)
    parts = codec.split_packed_rows(packed, 96)
    if bits == 8:
        stored, kind = pack_symmetric_codes(parts, 96), gguf.GGMLQuantizationType.Q8_0
        with pytest.raises(UserError, match="gguf Q8_0 has no zeros"):
            pack_symmetric_codes(parts._replace(zero=parts.zero + 1), 96)
    else:
        groups = convert_to_bias_groups(parts, 96, 32, torch.float16)
        stored, kind = pack_q4_1_blocks(groups), gguf.GGMLQuantizationType.Q4_1
    found = gguf.dequantize(stored.numpy(), kind)
    assert np.array_equal(found, codec.dequantize_rows(packed, 96, torch.float32).numpy())


def test_q8_0_rounds_codes_with_zeros_again() -> None:
    """Codes less their zeros need more than 8 bits; the error is at most 0.57 of a scale."""
    codec = AffineCodec(8, 32)
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(4)) + 1
    packed = codec.quantize_to_packed(weight)
    parts, rows = (
        codec.split_packed_rows(packed, 96),
        codec.dequantize_rows(packed, 96, torch.float),
    )
    signed = parts.codes.unflatten(1, (3, 32)).float() - parts.zero.float().unsqueeze(-1)
    assert float(signed.max()) > 127
    stored = pack_q8_0_blocks(rows)
    found = gguf.dequantize(stored.numpy(), gguf.GGMLQuantizationType.Q8_0)
    scale = stored.view(64, 3, 34)[:, :, :2].contiguous().view(torch.float16).float()
    error = (torch.from_numpy(found) - rows).abs().view(64, 3, 32)
    assert (error <= 0.57 * scale).all() and float((error / scale).max()) > 0.45
