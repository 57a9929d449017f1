"""Conversions against slow packers: any rows of a weight, whatever words they share."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dist_peft.core.span import Span
from dist_peft.quant.affine import AffineCodec, AffineParts
from dist_peft.quant.codec import RawCodec
from dist_peft.quant.import_formats import (
    check_packed_statistics,
    convert_awq_rows,
    convert_bnb_rows,
    convert_compressed_rows,
    convert_gptq_rows,
    dequantize_absmax,
    find_word_span,
    increment_codes,
    to_half,
    unpack_awq_zeros,
    unpack_gptq_zeros,
)
from dist_peft.quant.nf4 import Nf4Codec
from tests.support.packed import awq_words, pack_rows, words_of

BITS = st.sampled_from([2, 3, 4, 8])


def some_parts(rows: int, columns: int, bits: int, group: int = 16) -> AffineParts:
    generator = torch.Generator().manual_seed(rows + columns + bits)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8)
    shape = (rows, columns // group)
    scale = torch.rand(shape, generator=generator).add(0.1).half()
    zero = torch.randint(0, 2**bits, shape, generator=generator).half()
    return AffineParts(codes, scale, zero)


@st.composite
def spans(draw: st.DrawFn, rows: int) -> Span:
    start = draw(st.integers(0, rows))
    return Span(start, draw(st.integers(start, rows)))


@given(bits=BITS, span=spans(200))
def test_word_span_is_the_shortest_run_of_whole_codes(bits: int, span: Span) -> None:
    words, before = find_word_span(span, bits)
    codes = [n for n in range(400) if words.start * 32 <= n * bits < words.stop * 32]
    assert codes[before : before + len(span)] == list(range(span.start, span.stop))
    assert words.start * 32 % bits == words.stop * 32 % bits == 0
    most = 3 if bits == 3 else 1
    assert len(words) * 32 <= len(span) * bits + 2 * 32 * most


@given(bits=BITS, span=spans(32))
def test_gptq(bits: int, span: Span) -> None:
    codec, whole = AffineCodec(bits, 16), some_parts(32, 64, bits)
    qweight, qzeros = pack_rows(whole.codes, bits).T, pack_rows(whole.zero.T, bits)
    words, before = find_word_span(span, bits)
    zero = unpack_gptq_zeros(qzeros[:, words.slice], before, len(span), bits)
    assert torch.equal(zero, whole.zero[span.slice])
    found = convert_gptq_rows(qweight[:, span.slice], whole.scale[span.slice], zero)
    assert torch.equal(found, codec.join_packed_rows(whole, 64)[span.slice])


@given(span=spans(32))
def test_awq(span: Span) -> None:
    codec, whole = AffineCodec(4, 16), some_parts(32, 48, 4)
    qweight, qzeros = awq_words(whole.codes.T), awq_words(whole.zero.T)
    words, before = find_word_span(span, 4)
    zero = unpack_awq_zeros(qzeros[:, words.slice], before, len(span))
    found = convert_awq_rows(qweight[:, words.slice], before, whole.scale[span.slice], zero)
    assert torch.equal(found, codec.join_packed_rows(whole, 48)[span.slice])


def test_awq_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dist_peft.quant.packed_rows.CHUNK_ELEMENTS", 48 * 5)
    whole = some_parts(32, 48, 4)
    found = convert_awq_rows(awq_words(whole.codes.T)[:, 1:], 3, whole.scale[11:], whole.zero[11:])
    assert torch.equal(found, AffineCodec(4, 16).join_packed_rows(whole, 48)[11:])


@given(bits=BITS, columns=st.sampled_from([16, 48, 80]))
def test_compressed_with_a_last_word_that_is_not_full(bits: int, columns: int) -> None:
    whole = some_parts(5, columns, bits)
    found = convert_compressed_rows(pack_rows(whole.codes, bits), whole.scale, whole.zero)
    assert torch.equal(found, AffineCodec(bits, 16).join_packed_rows(whole, columns))


@given(bits=st.sampled_from([2, 4, 8]), data=st.data())
def test_plus_one_undoes_a_borrow(bits: int, data: st.DataObject) -> None:
    """Zeros less one, subtracted from whole words: a zero of 0 borrows from the next field."""
    fields = st.lists(st.integers(0, 2**bits - 1), min_size=64 // bits, max_size=64 // bits)
    zeros = data.draw(fields)
    words = torch.tensor([words_of(zeros, bits)])
    ones = words_of([1] * (32 // bits), bits)[0]
    first = ((words - ones + 2**31 & 0xFFFFFFFF) - 2**31).int()
    assert torch.equal(increment_codes(first, bits), words.int())


def test_plus_one_by_hand() -> None:
    words = torch.tensor([[0x77777777, -1]], dtype=torch.int32)
    assert increment_codes(words, 4).tolist() == [[0x88888888 - 2**32, 0x11111110]]


@pytest.mark.parametrize("before", [0, 7])
def test_denest_is_bitsandbytes_own(before: int) -> None:
    bnb = pytest.importorskip("bitsandbytes.functional")
    absmax = torch.rand(600, generator=torch.Generator().manual_seed(1))
    offset = absmax.mean()
    codes, state = bnb.quantize_blockwise(absmax - offset, blocksize=256)
    wanted = bnb.dequantize_blockwise(codes, state) + offset
    found = dequantize_absmax(
        codes[256 + before :], before, state.absmax[1:], state.code, float(offset), 256
    )
    assert torch.equal(found, wanted[256 + before :])


def test_bnb_rows() -> None:
    weight = torch.randn(6, 128, generator=torch.Generator().manual_seed(2))
    codec = Nf4Codec(64, double_quant=False)
    packed = codec.quantize_to_packed(weight)
    payload, absmax = codec.split_packed_rows(packed, 128)
    assert torch.equal(convert_bnb_rows(payload.flatten(), absmax, codec, 128), packed)


def test_to_half() -> None:
    exact = torch.tensor([[0.5, -(2.0**-17) * 1.25]]).bfloat16()
    half, change = to_half(exact)
    assert torch.equal(half.float(), exact.float()) and change == 0
    assert to_half(torch.tensor([[1 + 2.0**-12]]))[1] == pytest.approx(2.0**-12, rel=1e-3)
    assert to_half(torch.empty(0, 3))[1] == 0


@pytest.mark.parametrize("value", [1e5, 1e-9, float("nan"), float("inf")])
def test_scales_beyond_float16(value: float) -> None:
    with pytest.raises(ValueError, match=r"group 1 is beyond the range of float16"):
        to_half(torch.tensor([[1.0, value]]))


def test_statistics_that_are_not_finite() -> None:
    weight = torch.randn(3, 64, generator=torch.Generator().manual_seed(3))
    for codec in (AffineCodec(4, 32), Nf4Codec(32, double_quant=False)):
        packed = codec.quantize_to_packed(weight)
        check_packed_statistics(packed, codec, 64)
        for at in (32, packed.shape[1] - 4):
            bad = packed.clone()
            bad[1, at : at + 4] = torch.tensor([0, 0x7E, 0xC0, 0x7F], dtype=torch.uint8)
            with pytest.raises(ValueError, match="NaN or infinity in row 1"):
                check_packed_statistics(bad, codec, 64)
    check_packed_statistics(RawCodec().quantize_to_packed(weight), RawCodec(), 64)  # has none
