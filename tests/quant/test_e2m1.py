"""E2M1: which level is nearest, and codecs of it."""

import pytest
import torch

from dist_peft.quant.e2m1 import E2M1_LEVELS, E2m1Codec, find_nearest_e2m1
from dist_peft.quant.mxfp4 import Mxfp4Codec
from dist_peft.quant.nvfp4 import Nvfp4Codec


def test_halves_go_to_the_even_code() -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.5, 9.0])
    assert find_nearest_e2m1(ties).tolist() == [0, 2, 2, 4, 4, 6, 6, 7, 7]
    assert find_nearest_e2m1(-ties).tolist() == [8, 10, 10, 12, 12, 14, 14, 15, 15]


@pytest.mark.parametrize("codec", [Mxfp4Codec(), Nvfp4Codec()])
def test_every_code_decodes_to_its_level_times_the_scale(codec: E2m1Codec) -> None:
    """The sixteen levels are a row of weights; each is its own nearest one."""
    weight = torch.tensor(E2M1_LEVELS).repeat(2)[None]
    packed = codec.quantize_to_packed(weight)
    assert packed[0, :8].tolist() == [2 * i | (2 * i + 1) << 4 for i in range(8)]
    decoded = codec.dequantize_rows(packed, 32, torch.float32)
    assert torch.equal(decoded, weight) and torch.equal(decoded.signbit(), weight.signbit())
    assert codec.describe_storage() == f"{codec.name}, 4 bits in groups of {codec.group_size}"
