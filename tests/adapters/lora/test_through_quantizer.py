"""Rows of ``quantize(W + s B A)``: the same bytes at any cut, and what is refused."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from dist_peft.adapters.lora.layer import LoraSpec
from dist_peft.adapters.lora.merge import LoraMerger
from dist_peft.adapters.lora.tensors import LoraTensors
from dist_peft.adapters.lora.through_quantizer import (
    ThroughLinear,
    require_codec,
    require_trainable_zeros,
    resolve_start,
    update_rows,
)
from dist_peft.core.errors import UserError
from dist_peft.core.span import Span, row_span
from dist_peft.export.formats.groups import convert_to_bias_groups
from dist_peft.model.frozen_linear import FrozenLinear, WeightRows
from dist_peft.model.sample_dropout import DropoutPosition, SampleDropout
from dist_peft.quant import packed_rows
from dist_peft.quant.affine import AffineCodec
from dist_peft.quant.codec import Codec, RawCodec
from dist_peft.quant.fp4 import Fp4Codec
from dist_peft.quant.fp8 import Fp8Codec
from dist_peft.quant.kept_grid import count_changed_codes, quantize_on_grid
from dist_peft.quant.llm_int8 import LlmInt8Codec
from dist_peft.quant.mxfp4 import Mxfp4Codec
from dist_peft.quant.nf4 import Nf4Codec
from dist_peft.quant.nvfp4 import Nvfp4Codec
from dist_peft.quant.ordered_columns import OrderedColumnsCodec

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
        found.append(layer.encode_own_rows(A, B[span.slice], CPU))
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


ORDER = torch.randperm(IN, generator=torch.Generator().manual_seed(3))
PACKED: list[Codec] = [
    AffineCodec(4, 32),
    AffineCodec(3, 16, "hqq"),
    OrderedColumnsCodec.from_order(AffineCodec(4, 32), ORDER),
    Nf4Codec(64, double_quant=False),
    Fp4Codec(64),
    Fp8Codec(32),
    LlmInt8Codec(),
    Mxfp4Codec(),
    Nvfp4Codec(),
]


@pytest.mark.parametrize("codec", PACKED, ids=lambda codec: codec.describe_storage())
def test_codes_of_a_packed_base_move_on_its_own_grid(codec: Codec) -> None:
    """At any cut; without an update the bytes of the base. A merge of the packed rows, chunk by
    chunk, gives the same. Which codes these are: ``tests/quant/test_kept_grid.py``."""
    W, A, B = draw_values()
    base = codec.quantize_to_packed(W)

    def encode_parts(parts: int, B: Tensor) -> Tensor:
        found = []
        for index in range(parts):
            layer, span = build_layer(codec), row_span(OUT, parts, index)
            layer.base.stored = layer.base  # any reader of packed rows
            layer.keep_packed_rows(base[span.slice], span)
            rows = codec.dequantize_rows(base[span.slice], IN, torch.float32)
            assert layer.prepare_base_rows(rows, span, lambda t: t) is rows
            found.append(layer.encode_own_rows(A, B[span.slice], CPU, count=True))
            assert (layer.num_changed > 0) == bool(B.any())
        return torch.cat(found)

    trained = encode_parts(1, B)
    assert torch.equal(encode_parts(3, B), trained) and torch.equal(encode_parts(7, B), trained)
    assert torch.equal(encode_parts(2, torch.zeros_like(B)), base)
    assert torch.equal(*(codec.read_statistics(packed, IN) for packed in (base, trained)))
    dense = codec.dequantize_rows(base, IN, torch.float32).double()
    dense += SCALING * (B.double() @ A.double())
    assert codec.grid_rows is not None
    slow = quantize_on_grid(dense.float(), base, codec.grid_rows, IN)
    assert count_changed_codes(slow, trained, codec.grid_rows, IN) < 2e-3 * OUT * IN
    merger = LoraMerger({"m": LoraTensors(A, B, SCALING, None, False, None)}, None, {}, True)
    linear = build_layer(codec).base
    linear.stored = linear
    for span in Span(0, OUT).split_into_chunks(50):
        change = partial(merger.compute_encoded_rows, "m.weight", span=span)
        assert torch.equal(
            WeightRows(linear, base[span.slice]).to_packed(change), trained[span.slice]
        )


def encode_with_zeros(codec: Codec, parts: int, factor: float = 1.0) -> Tensor:
    (W, A, B), (Az, Bz) = draw_values(), draw_zero_pair(codec)
    found = []
    for index in range(parts):
        layer, span = build_layer(codec), row_span(OUT, parts, index)
        layer.train_zeros("cpu")
        layer.prepare_base_rows(W[span.slice].clone(), span, lambda t: t)
        zeros = (Az, factor * Bz[span.slice])
        found.append(layer.encode_own_rows(A, B[span.slice], CPU, zeros=zeros))
    return torch.cat(found)


def draw_zero_pair(codec: Codec) -> tuple[Tensor, Tensor]:
    generator, grid = torch.Generator().manual_seed(1), codec.affine_rows
    assert grid is not None
    A = torch.randn(RANK, IN // grid.group_size, generator=generator)
    return A, torch.randn(OUT, RANK, generator=generator) * 0.02


@pytest.mark.parametrize("codec", [AffineCodec(2, 32), AffineCodec(3, 16, "hqq")], ids=str)
def test_trained_zeros_hold_the_change_of_their_groups_at_any_cut(codec: AffineCodec) -> None:
    """Codes and scales are those without the pair; a merge of the files gives the same bytes."""
    (W, A, B), (Az, Bz) = draw_values(), draw_zero_pair(codec)
    whole, plain = encode_with_zeros(codec, 1), encode(codec, 1)
    for parts in (2, 3, 7):
        assert torch.equal(encode_with_zeros(codec, parts), whole)
    own, found, unmoved = (
        codec.split_packed_rows(packed, IN)
        for packed in (plain, whole, encode_with_zeros(codec, 3, 0.0))
    )
    exact = {"rtol": 0, "atol": 0.0 if codec.has_integer_zeros else 2**-15}
    torch.testing.assert_close(unmoved.zero, own.zero, **exact)
    assert torch.equal(own.codes, found.codes) and torch.equal(own.scale, found.scale)
    wanted = own.zero.double() - SCALING * (Bz.double() @ Az.double()) / own.scale.double()
    torch.testing.assert_close(found.zero.double(), wanted, rtol=2**-11, atol=2**-15)
    assert torch.equal((found.zero.double() * 2**14).round(), found.zero.double() * 2**14)
    groups = convert_to_bias_groups(found._replace(zero=found.zero.float()), IN, 16, torch.float32)
    assert torch.equal(groups.dequantize(), codec.dequantize_rows(whole, IN, torch.float32))
    extra = {"m.zero_A": Az, "m.zero_B": Bz}
    merger = LoraMerger({"m": LoraTensors(A, B, SCALING, None, False, None)}, None, extra, True)
    for span in Span(0, OUT).split_into_chunks(50):
        rows = merger.compute_encoded_rows("m.weight", W[span.slice], span)
        packed = codec.quantize_to_packed(rows)
        moved = merger.finish_packed_rows("m.weight", packed, span, codec, IN)
        assert torch.equal(moved, whole[span.slice])
    with pytest.raises(UserError, match=r"moves the zeros of \d+ groups .* belongs to"):
        merger.finish_packed_rows("m.weight", packed, span, AffineCodec(2, 64), IN)


def test_the_pair_of_the_zeros_starts_without_a_change_and_needs_integers() -> None:
    layer = build_layer(AffineCodec(2, 32))
    assert not layer.trains_zeros
    layer.train_zeros("cpu")
    assert layer.trains_zeros and layer.shapes["zero_A"] == (RANK, IN // 32)
    assert not layer.init_rows("zero_B", Span(0, OUT)).any()
    A = layer.init_rows("zero_A", Span(0, RANK))
    assert 0 < float(A.abs().max()) <= IN**-0.5
    require_trainable_zeros("m", layer.base)
    with pytest.raises(UserError, match=r"stored as nf4, which has none"):
        require_trainable_zeros("m", build_layer(Nf4Codec(64, double_quant=False)).base)
    layer.base.stored = layer.base  # any reader of packed rows
    with pytest.raises(UserError, match=r"zeros of m are those of the files"):
        require_trainable_zeros("m", layer.base)
    with pytest.raises(UserError, match=r"m: rows of W .* a zero of row 0 is beyond float16"):
        encode_with_zeros(AffineCodec(2, 32), 1, 1e7)


def test_a_run_is_warned_where_the_grid_of_a_packed_base_hides_its_updates(
    caplog: pytest.LogCaptureFixture,
) -> None:
    codec, (W, A, B) = AffineCodec(4, 32), draw_values()
    layer = build_layer(codec)
    layer.base.stored = layer.base
    layer.keep_packed_rows(codec.quantize_to_packed(W), Span(0, OUT))

    def update(B: Tensor) -> str:
        caplog.clear()
        access = SimpleNamespace(
            device=CPU,
            gather_parameter=lambda name: {"m.lora_A": A}[name],
            gather_matching_rows=lambda name, like: {"m.lora_B": B}[name],
            overwrite_local_rows=list,
        )
        update_rows([("m", layer)], access, count=True)  # type: ignore[arg-type]
        return caplog.text

    with caplog.at_level("WARNING", "dist_peft"):
        assert "0.00 % of the codes of the packed base have moved" in update(B * 1e-4)
        assert not update(B)
        layer.base.stored = None
        layer.prepare_base_rows(W, Span(0, OUT), lambda t: t)
        assert not update(B * 1e-4)


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


def test_codecs_that_cannot_hold_the_trained_weights_are_refused() -> None:
    require_codec("m", build_layer(AffineCodec(4, 32), 100).base)
    nf4 = Nf4Codec(64, double_quant=False)
    require_codec("m", build_layer(nf4).base)
    with pytest.raises(UserError, match="in_features 96, which 64 does not divide"):
        require_codec("m", build_layer(nf4, 96).base)
    with pytest.raises(UserError, match=r"set base\.quant\.double_quant: false"):
        require_codec("m", build_layer(Nf4Codec(64, double_quant=True)).base)
    with pytest.raises(UserError, match=r"not quantized; set base\.quant"):
        require_codec("m", build_layer(RawCodec()).base)
    packed = build_layer(nf4).base
    for codec in (nf4, Nf4Codec(64, double_quant=True), AffineCodec(4, 32), Nvfp4Codec()):
        packed = build_layer(codec).base
        packed.stored = packed  # any reader of packed rows
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
