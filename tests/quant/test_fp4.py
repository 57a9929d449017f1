"""FP4 rows against bitsandbytes' own encoding and decoding."""

import pytest
import torch

from dist_peft.core.config.run import QuantConfig
from dist_peft.quant.codec import make_codec
from dist_peft.quant.fp4 import FP4_LEVELS, Fp4Codec
from dist_peft.quant.pack import unpack_bits


def test_encodes_and_decodes_as_bitsandbytes() -> None:
    """Groups of a row's own: scales and values, bit for bit; of zeros, which have two codes, the
    one that bitsandbytes takes depends on its device."""
    functional = pytest.importorskip("bitsandbytes").functional
    weight = torch.randn(40, 192, generator=torch.Generator().manual_seed(0)) * 0.02
    weight[3] = 0
    codec = Fp4Codec(64)
    packed = codec.quantize_to_packed(weight)
    data, state = functional.quantize_4bit(weight, quant_type="fp4", blocksize=64)
    assert torch.equal(codec.read_statistics(packed, 192).flatten(), state.absmax)
    codes, own = (unpack_bits(t.flatten(), 4, high_first=True) for t in (packed[:, :96], data))
    assert torch.equal(codes, torch.where(own == 8, 0, own))
    for dtype in (torch.float32, torch.bfloat16):
        state.dtype = dtype
        wanted = functional.dequantize_4bit(data, state)
        assert torch.equal(codec.dequantize_rows(packed, 192, dtype), wanted)


def test_each_code_has_its_level_and_the_nearest_is_taken() -> None:
    codec = make_codec(QuantConfig(kind="fp4", group_size=16), torch.float32)
    assert isinstance(codec, Fp4Codec)
    levels = torch.tensor(FP4_LEVELS)[None]
    packed = codec.quantize_to_packed(levels * 3)
    assert torch.equal(codec.dequantize_rows(packed, 16, torch.float32), levels * 3)
    numbers = torch.linspace(-1, 1, 16 * 63).view(63, 16)
    numbers[:, 0] = 1  # the scale of each group
    found = codec.dequantize_rows(codec.quantize_to_packed(numbers), 16, torch.float32)
    error = (numbers.unsqueeze(-1) - levels).abs().amin(-1)
    assert torch.equal((found - numbers).abs(), error)


def test_groups_are_multiples_of_8() -> None:
    with pytest.raises(ValueError, match="group_size 12 is not a positive multiple of 8"):
        Fp4Codec(12)
