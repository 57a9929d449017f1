"""Rows of ``quantize(W + s B A)``: the same bytes at any cut, and what is refused."""

import pytest
import torch
from torch import Tensor

from dist_peft.adapters.lora.layer import LoraSpec
from dist_peft.adapters.lora.merge import LoraMerger
from dist_peft.adapters.lora.tensors import LoraTensors
from dist_peft.adapters.lora.through_quantizer import (
    ThroughLinear,
    keep_rows_exactly,
    require_codec,
    resolve_start,
)
from dist_peft.core.errors import UserError
from dist_peft.core.span import Span, row_span
from dist_peft.model.frozen_linear import FrozenLinear
from dist_peft.model.sample_dropout import DropoutPosition, SampleDropout
from dist_peft.quant import packed_rows
from dist_peft.quant.affine import AffineCodec
from dist_peft.quant.codec import Codec, RawCodec
from dist_peft.quant.nf4 import Nf4Codec

CPU = torch.device("cpu")
OUT, IN, RANK, SCALING = 201, 128, 6, 2.0
CODECS: list[Codec] = [
    Nf4Codec(64, double_quant=False),
    *(AffineCodec(bits, 32) for bits in (8, 4, 3, 2)),
    AffineCodec(2, 16, "hqq"),
]


def build_layer(codec: Codec, columns: int = IN) -> ThroughLinear:
    base = FrozenLinear(columns, OUT, codec, False, torch.float32, "m.weight", "cpu")
    spec = LoraSpec(RANK, SCALING, torch.float32, 0)
    dropout = SampleDropout(0.0, "m", DropoutPosition(0))
    return ThroughLinear(base, "m", spec, dropout, "cpu")


def draw_values() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(OUT, IN, generator=generator).bfloat16().float() * 0.25
    A = torch.randn(RANK, IN, generator=generator)
    return W, A, torch.randn(OUT, RANK, generator=generator) * 0.1


def encode(codec: Codec, parts: int) -> Tensor:
    W, A, B = draw_values()
    found = []
    for index in range(parts):
        layer, span = build_layer(codec), row_span(OUT, parts, index)
        rows = W[span.slice].clone()
        assert layer.prepare_base_rows(rows, span, lambda t: t) is rows
        assert layer.own_rows.dtype == torch.bfloat16  # half of the memory
        found.append(layer.encode_own_rows(A, B, CPU))
    return torch.cat(found)


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_bytes_do_not_depend_on_the_cut_or_on_the_chunk(
    codec: Codec, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = encode(codec, 1)
    for parts in (2, 3, 7):
        assert torch.equal(encode(codec, parts), whole)
    monkeypatch.setattr(packed_rows, "CHUNK_ELEMENTS", 64 * IN)
    assert torch.equal(encode(codec, 3), whole)
    W, A, B = draw_values()
    dense = (W.double() + SCALING * (B.double() @ A.double())).float()
    slow = codec.dequantize_rows(codec.quantize_to_packed(dense), IN, torch.float32)
    found = codec.dequantize_rows(whole, IN, torch.float32)
    # a value at the border of two cells may fall to either side
    assert float((found - slow).abs().gt(1e-6).float().mean()) < 2e-3
    assert not torch.equal(whole, codec.quantize_to_packed(W))


def test_a_merge_of_the_files_gives_the_trained_rows() -> None:
    """An export computes ``W + s B A`` by the same blocks, from its own chunks."""
    codec, (W, A, B) = AffineCodec(4, 32), draw_values()
    trained = encode(codec, 3)
    merger = LoraMerger({"m": LoraTensors(A, B, SCALING, None, False, None)}, None, {})
    for start in range(0, OUT, 50):
        span = Span(start, min(OUT, start + 50))
        rows = merger.merge_weight_rows("m.weight", W[span.slice].bfloat16(), span, "original")
        assert torch.equal(codec.quantize_to_packed(rows), trained[span.slice])


def test_without_an_update_the_rows_are_those_of_the_base() -> None:
    codec, (W, A, B) = Nf4Codec(64, double_quant=False), draw_values()
    layer = build_layer(codec)
    layer.prepare_base_rows(W, Span(0, OUT), lambda t: t)
    rows = layer.encode_own_rows(A, torch.zeros_like(B), CPU)
    assert torch.equal(rows, codec.quantize_to_packed(W))


def test_rows_are_kept_in_the_narrowest_exact_type() -> None:
    values = torch.tensor([[1.0, 2.0**-20, 300.0]])
    assert keep_rows_exactly(values).dtype == torch.bfloat16
    half = torch.tensor([[1 + 2.0**-10]])
    assert keep_rows_exactly(half).dtype == torch.float16
    full = torch.tensor([[1 + 2.0**-20]])
    kept = keep_rows_exactly(full)
    assert kept.dtype == torch.float32 and torch.equal(kept, full)
    full.zero_()  # a copy
    assert float(kept) == 1 + 2.0**-20


def test_codecs_that_cannot_hold_the_trained_weights_are_refused() -> None:
    require_codec("m", build_layer(AffineCodec(4, 32), 100).base)
    nf4 = Nf4Codec(64, double_quant=False)
    require_codec("m", build_layer(nf4).base)
    with pytest.raises(UserError, match="in_features 96, which 64 does not divide"):
        require_codec("m", build_layer(nf4, 96).base)
    with pytest.raises(UserError, match=r"not quantized; set base\.quant"):
        require_codec("m", build_layer(RawCodec()).base)
    packed = build_layer(nf4).base
    packed.stored = packed  # any reader of packed rows
    with pytest.raises(UserError, match=r"comes quantized from base\.path"):
        require_codec("m", packed)


def test_the_form_of_the_first_steps() -> None:
    own, packed = build_layer(AffineCodec(3, 32)), build_layer(AffineCodec(3, 32))
    packed.base.stored = packed.base  # any reader of packed rows
    assert resolve_start("auto", [own]) == "none"
    assert resolve_start("auto", [own, packed]) == "lora"
    assert resolve_start("none", [packed]) == "none"
    assert resolve_start("8bit", [own]) == "8bit"
    with pytest.raises(UserError, match=r"through_start: 8bit .* m comes quantized"):
        resolve_start("8bit", [own, packed])


def test_values_beyond_the_codec_name_the_linear_and_the_fix() -> None:
    W, A, B = draw_values()
    layer = build_layer(AffineCodec(4, 32))
    layer.prepare_base_rows(W, Span(0, OUT), lambda t: t)
    with pytest.raises(UserError, match=r"m: rows of W \+ s B A .* lower train.lr"):
        layer.encode_own_rows(A * torch.inf, B, CPU)
