"""NVFP4 against a search of the nearest level."""

import pytest
import torch

from dist_peft.core.config.run import QuantConfig
from dist_peft.quant.codec import make_codec
from dist_peft.quant.e2m1 import E2M1_LEVELS
from dist_peft.quant.nvfp4 import Nvfp4Codec

CODEC = Nvfp4Codec()


def test_encodes_the_nearest_level() -> None:
    """Rows of every size, a group of zeros, one far below the others, a short last group."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(12, 53, generator=generator)
    weight *= 10.0 ** torch.linspace(-37, 37, 12).unsqueeze(1)
    weight[3, :16] = 0
    weight[4, 16:32] *= 1e-9
    weight[5] = 0
    packed = CODEC.quantize_to_packed(weight)
    assert packed.shape == (12, CODEC.num_row_bytes(53)) and packed.shape[1] == 4 * 8 + 4 + 4
    scales = CODEC.read_statistics(packed, 53)
    decoded = CODEC.dequantize_rows(packed, 53, torch.float32)
    for row in range(12):
        largest = weight[row].abs().max()
        factor = 2.0 ** (torch.tensor(2688.0) / largest).clamp(max=2.0**126).log2().floor()
        if not largest:
            factor = torch.tensor(1.0)
        for group, part in enumerate(weight[row].split(16)):
            stored = (factor * part.abs().max() / 6).clamp(2.0**-9, 448).to(torch.float8_e4m3fn)
            scale = stored.float() / factor
            assert scales[row, group] == scale, (row, group)
            for column, number in enumerate(part.tolist()):
                size = abs(number / float(scale))
                nearest = min(abs(level - size) for level in E2M1_LEVELS[:8])
                found = float(decoded[row, 16 * group + column] / scale)
                assert found * number >= 0
                assert abs(abs(found) - size) <= nearest * (1 + 1e-5) + 1e-5


def test_bad_scales_are_no_finite_statistics() -> None:
    packed = CODEC.quantize_to_packed(torch.ones(3, 16))
    packed[0, 8] = 0x7F
    packed[1, -4:] = 0
    finite = CODEC.read_statistics(packed, 16).isfinite()
    assert finite.tolist() == [[False], [False], [True]]


def test_configuration() -> None:
    quant = QuantConfig(kind="nvfp4")
    assert make_codec(quant, torch.bfloat16) == CODEC and (quant.bits, quant.group_size) == (4, 16)
    for bad, text in (({"bits": 8}, "has 4 bits"), ({"group_size": 64}, "groups of 16")):
        with pytest.raises(ValueError, match=text):
            QuantConfig(kind="nvfp4", **bad)
