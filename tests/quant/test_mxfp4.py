"""MXFP4 against a search of the nearest level, and against the decoding of transformers."""

import math

import pytest
import torch
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from dist_peft.core.config.run import QuantConfig
from dist_peft.quant.codec import make_codec
from dist_peft.quant.e2m1 import E2M1_LEVELS
from dist_peft.quant.mxfp4 import Mxfp4Codec

CODEC = Mxfp4Codec()


def quantize_slowly(group: list[float]) -> tuple[list[int], int]:
    """Codes and exponent byte of a group by search, in exact arithmetic of Python's floats."""
    largest = max(abs(w) for w in group)
    exponent = next((e for e in range(-127, 125) if 6 * 2.0**e >= largest), 125)
    if not largest:
        exponent = -127
    codes = []
    for weight in group:
        size = abs(weight) / 2.0**exponent
        distance = [
            (abs(level - size), code % 2, code) for code, level in enumerate(E2M1_LEVELS[:8])
        ]
        codes.append(min(distance)[2] + 8 * (math.copysign(1, weight) < 0))
    return codes, exponent + 127


def odd_weights() -> Tensor:
    """Gaussian rows of sizes from subnormal to the largest, ties, zeros and short last groups."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 71, generator=generator)
    weight *= 10.0 ** torch.linspace(-41, 37.8, 24).unsqueeze(1)
    weight[3, :40] = 0
    weight[4, 5] = -0.0
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0])
    weight[12, :16] = torch.cat((ties, -ties)) * 2.0**-7
    weight[12, 16:32] = 0
    return weight


def test_encodes_the_nearest_level_and_the_least_exponent() -> None:
    weight = odd_weights()
    packed = CODEC.quantize_to_packed(weight)
    assert packed.shape == (24, CODEC.num_row_bytes(71)) and packed.shape[1] == 52
    padded = torch.nn.functional.pad(weight, (0, 96 - 71)).view(24, 3, 32)
    for row in range(24):
        for group in range(3):
            codes, exponent = quantize_slowly(padded[row, group].tolist())
            low, high = codes[0::2], codes[1::2]
            wanted = [a | b << 4 for a, b in zip(low, high, strict=True)]
            assert packed[row, 16 * group : 16 * group + 16].tolist() == wanted, (row, group)
            assert int(packed[row, 48 + group]) == exponent, (row, group)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decodes_as_transformers(dtype: torch.dtype) -> None:
    """All codes with every exponent that a row may have; blocks and scales as gpt-oss has them."""
    experts, rows, groups = 2, 127, 3
    generator = torch.Generator().manual_seed(1)
    blocks = torch.randint(0, 256, (experts, rows, groups, 16), generator=generator).to(torch.uint8)
    scales = torch.arange(experts * rows * groups).remainder(253).view(experts, rows, groups)
    scales = scales.to(torch.uint8)
    wanted = convert_moe_packed_tensors(blocks, scales, dtype=dtype).transpose(1, 2)
    fields = blocks.flatten(2).flatten(0, 1), scales.flatten(0, 1)
    packed = torch.nn.functional.pad(torch.cat(fields, 1), (0, -3 % 4))
    decoded = CODEC.dequantize_rows(packed, 96, dtype)
    assert torch.equal(decoded, wanted.flatten(0, 1))
    assert scales.unique().numel() == 253
    assert torch.equal(CODEC.dequantize_rows(packed, 83, dtype), decoded[:, :83])


def test_values_of_the_format_are_kept() -> None:
    weight = CODEC.dequantize_rows(CODEC.quantize_to_packed(odd_weights()), 71, torch.float32)
    again = CODEC.dequantize_rows(CODEC.quantize_to_packed(weight), 71, torch.float32)
    assert torch.equal(again, weight)


def test_exponents_without_a_number_are_no_finite_scale() -> None:
    packed = CODEC.quantize_to_packed(torch.ones(4, 32))
    packed[:, 16] = torch.tensor([252, 253, 254, 255], dtype=torch.uint8)
    assert CODEC.read_statistics(packed, 32).isfinite().tolist() == [
        [True],
        [False],
        [False],
        [False],
    ]


def test_configuration() -> None:
    quant = QuantConfig(kind="mxfp4")
    assert make_codec(quant, torch.bfloat16) == CODEC and (quant.bits, quant.group_size) == (4, 32)
    assert "group_size" not in quant.model_fields_set
    for bad, text in (({"bits": 8}, "has 4 bits"), ({"group_size": 64}, "groups of 32")):
        with pytest.raises(ValueError, match=text):
            QuantConfig(kind="mxfp4", **bad)
