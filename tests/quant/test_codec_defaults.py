"""Views of packed rows: who has one, and that it is the decoded weight."""

import torch

from dist_peft.quant.affine import AffineCodec
from dist_peft.quant.codec import RawCodec
from dist_peft.quant.codec_defaults import CodecDefaults
from dist_peft.quant.kernels import NF4_LEVELS
from dist_peft.quant.nf4 import Nf4Codec


def test_defaults_are_those_of_rows_that_no_format_keeps() -> None:
    codec = CodecDefaults()
    assert codec.is_quantized and codec.affine_rows is None and codec.nf4_rows is None
    assert not RawCodec().is_quantized and RawCodec().affine_rows is None


def test_affine_view_is_the_decoded_weight() -> None:
    codec = AffineCodec(3, 8)
    packed = codec.quantize_to_packed(torch.randn(5, 19))
    parts = codec.affine_rows.split_packed_rows(packed, 19)
    codes = parts.codes.view(5, 3, 8).float()
    weight = (codes - parts.zero.float()[..., None]) * parts.scale.float()[..., None]
    assert torch.equal(weight.flatten(1)[:, :19], codec.dequantize_rows(packed, 19, torch.float32))


def test_nf4_view_is_the_decoded_weight() -> None:
    codec = Nf4Codec(8)
    packed = codec.quantize_to_packed(torch.randn(5, 19))
    payload, scales = codec.nf4_rows.split_packed_rows(packed, 19)
    codes = torch.stack((payload >> 4, payload & 15), -1).flatten(1).long()
    weight = torch.tensor(NF4_LEVELS)[codes] * scales.repeat_interleave(8, 1)
    assert torch.equal(weight[:, :19], codec.dequantize_rows(packed, 19, torch.float32))
