"""Rows of LLM.int8 against bitsandbytes' own encoding and decoding."""

import pytest
import torch

from dist_peft.core.config.run import QuantConfig
from dist_peft.quant.codec import make_codec
from dist_peft.quant.llm_int8 import LlmInt8Codec


@pytest.mark.parametrize("columns", [64, 37])
def test_encodes_and_decodes_as_bitsandbytes(columns: int) -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    weight = torch.randn(50, columns, generator=torch.Generator().manual_seed(0))
    weight *= 10.0 ** torch.linspace(-5, 3, 50).unsqueeze(1)
    weight[3] = 0
    codec = make_codec(QuantConfig(kind="llm_int8"), torch.float32)
    assert isinstance(codec, LlmInt8Codec)
    packed = codec.quantize_to_packed(weight)
    half = weight.half()
    codes, stats, _ = functional.int8_vectorwise_quant(half)
    assert torch.equal(codec.quantize_to_packed(half)[:, :columns].view(torch.int8), codes)
    scales = codec.read_statistics(packed, columns)
    own = functional.int8_vectorwise_dequant(packed[:, :columns].view(torch.int8), scales[:, 0])
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(codec.dequantize_rows(packed, columns, dtype), own.to(dtype))
    assert ((own - weight).abs() <= scales / 127 * 0.5001).all()
    assert stats.shape == (50,)
