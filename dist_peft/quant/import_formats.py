"""Packed tensors of other libraries -> rows of our codecs, without a rounding step in between.

Rows ``[a, b)`` of a linear ``[out, in]`` in groups of ``g`` (words are int32, codes an LSB-first
stream unless said otherwise)::

    gptq   qweight [in * bits / 32, out]  codes down the in axis: a column is one of our streams
           scales  [in / g, out]          qzeros [in / g, out * bits / 32], along out
    awq    qweight [in, out / 8]          qzeros [in / g, out / 8], both along out in the order
           scales  [in / g, out]          0 2 4 6 1 3 5 7 of a word's nibbles, lowest first
    compressed-tensors (pack-quantized)
           weight_packed [out, in * bits / 32]   codes along in: a row is one of our streams
           weight_scale  [out, in / g]
           weight_zero_point [out * bits / 32, in / g], down the out axis; none if symmetric
    bitsandbytes NF4
           weight [out * in / 2]          two codes a byte, rows flattened, the even code high
           absmax [out * in / 64]         of blocks that run from one row into the next

The integer formats all decode as ``(q - zero) * scale`` with unsigned codes and zeros: codes
that compressed-tensors calls signed lie ``2**(bits - 1)`` higher in the file. GPTQ's first version
stores zeros less one, subtracted from (and on loading added to) whole words, as ``gptqmodel`` does:
a field of 0 borrowed from its neighbour, and the addition gives it back.

A row's scales must be float16 here. Scales of another type are rounded to it, which for bfloat16 is
exact down to 2**-17; ``to_half`` says by how much they changed.
"""

import math

import torch
from torch import Tensor

from dist_peft.core.span import Span
from dist_peft.quant.codec import Codec
from dist_peft.quant.pack import pack_bits, unpack_bits
from dist_peft.quant.packed_rows import align_to_4_bytes, list_row_chunks, view_as_bytes

__all__ = [
    "check_packed_statistics",
    "convert_awq_rows",
    "convert_bnb_rows",
    "convert_compressed_rows",
    "convert_gptq_rows",
    "dequantize_absmax",
    "find_word_span",
    "increment_codes",
    "to_half",
    "unpack_awq_zeros",
    "unpack_gptq_zeros",
]

_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in its word the code of each of 8 neighbouring rows is, in nibbles from the lowest."""


def find_word_span(rows: Span, bits: int) -> tuple[Span, int]:
    """The whole words that hold the codes of ``rows``, packed along ``out``.

    Returns:
        The words (of 3-bit codes whole triples, which hold 32), and how many codes in them come
        before the first of ``rows``.
    """
    words = bits // math.gcd(32, bits)  # a run of words that begins and ends with whole codes
    codes = words * 32 // bits
    first = rows.start // codes
    stop = max(first, -(-rows.stop // codes))
    return Span(first * words, stop * words), rows.start - first * codes


def increment_codes(words: Tensor, bits: int) -> Tensor:
    """Zeros of GPTQ's first version -> as they are: 1 is added to each field, in whole words.

    Of 3-bit fields, which cross words, writers disagree about where the ones belong.
    """
    assert 32 % bits == 0, bits
    added = words.long() + sum(1 << place for place in range(0, 32, bits))
    # the carry out of a word is dropped: two's complement
    return ((added + 2**31 & 0xFFFFFFFF) - 2**31).to(torch.int32)


def unpack_gptq_zeros(words: Tensor, before: int, rows: int, bits: int) -> Tensor:
    """Zeros of consecutive rows, packed along ``out``.

    Args:
        words: ``int32 [groups, k]``.
        before: codes in them that come before the first row.
        rows: how many are wanted.
        bits: of a code.

    Returns:
        ``float16 [rows, groups]``.
    """
    codes = unpack_bits(view_as_bytes(words), bits)
    return codes[:, before : before + rows].T.half()


def unpack_awq_zeros(words: Tensor, before: int, rows: int) -> Tensor:
    """The same in AWQ's order of nibbles."""
    return _unpack_awq_codes(words)[:, before : before + rows].T.half()


def to_half(scale: Tensor) -> tuple[Tensor, float]:
    """Scales in float16, and the largest relative change of one of them.

    Raises:
        ValueError: one is not finite, or beyond the range of float16 (its group would decode to
            infinity, or to 0).
    """
    half = scale.half()
    lost = ~half.isfinite() | ((half == 0) & (scale != 0))
    if bool(lost.any()):
        row, group = (int(i) for i in lost.nonzero()[0])
        raise ValueError(
            f"scale {float(scale[row, group]):.4g} of group {group} is beyond the range of "
            "float16, 2**-24 to 65504"
        )
    change = (half.double() - scale.double()).abs() / scale.double().abs().clamp_min(2.0**-40)
    return half, float(change.max()) if change.numel() else 0.0


def convert_gptq_rows(qweight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Columns of GPTQ's tensors -> rows of ``AffineCodec``, ``uint8 [n, row_bytes]``.

    Args:
        qweight: ``int32 [in * bits / 32, n]``.
        scale, zero: ``float16 [n, groups]``.
    """
    return _build_affine_rows(view_as_bytes(qweight.T), scale, zero)


def convert_awq_rows(qweight: Tensor, before: int, scale: Tensor, zero: Tensor) -> Tensor:
    """Columns of AWQ's tensors (GEMM layout) -> rows of ``AffineCodec``, ``uint8 [n, row_bytes]``.

    Args:
        qweight: ``int32 [in, k]``: whole words of 8 rows.
        before: rows in the words that come before the first.
        scale, zero: ``float16 [n, groups]``.
    """
    rows, in_features = scale.shape[0], qweight.shape[0]
    stream = torch.zeros(rows, align_to_4_bytes(in_features // 2), dtype=torch.uint8)
    for span in list_row_chunks(rows, in_features, qweight.device):
        words, ahead = find_word_span(span.shifted_by(before), 4)
        codes = _unpack_awq_codes(qweight[:, words.slice])[:, ahead : ahead + len(span)]
        stream[span.slice, : in_features // 2] = pack_bits(codes.T.contiguous(), 4)
    return _build_affine_rows(stream, scale, zero)


def convert_compressed_rows(packed: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Rows of compressed-tensors' ``pack-quantized`` -> rows of ``AffineCodec``.

    Args:
        packed: ``int32 [n, ceil(in * bits / 32)]``.
        scale, zero: ``float16 [n, groups]``.
    """
    return _build_affine_rows(view_as_bytes(packed), scale, zero)


def convert_bnb_rows(payload: Tensor, absmax: Tensor, codec: Codec, in_features: int) -> Tensor:
    """bitsandbytes' NF4 -> ``uint8 [n, row_bytes]`` of a codec without double quantization.

    Args:
        payload: ``uint8 [n * in / 2]``.
        absmax: ``float32 [n, in / group_size]``: of groups of the codec, which divide a row.
        codec: its ``group_size`` divides ``in_features``.
    """
    rows = payload.view(-1, in_features // 2)
    packed = torch.cat((rows, view_as_bytes(absmax)), 1)
    assert packed.shape[1] == codec.num_row_bytes(in_features), (packed.shape, codec)
    return packed


def dequantize_absmax(
    codes: Tensor, before: int, nested: Tensor, levels: Tensor, offset: float, block: int = 256
) -> Tensor:
    """Undo bitsandbytes' double quantization: ``levels[code] * nested absmax + offset``.

    Args:
        codes: ``uint8 [n]``.
        before: codes of the first second-level block that come before these.
        nested: ``float32``, a magnitude per ``block`` codes.
        levels: ``float32 [256]``.
        offset: the mean that was subtracted.

    Returns:
        ``float32 [n]``, bit for bit the values that bitsandbytes computes with.
    """
    magnitude = nested.repeat_interleave(block)[before : before + len(codes)]
    absmax = levels.index_select(0, codes.int()).mul_(magnitude)
    return absmax.add_(offset)


def check_packed_statistics(packed: Tensor, codec: Codec, in_features: int) -> None:
    """Raise ValueError when a scale or zero of packed rows is NaN or infinite."""
    finite = codec.read_statistics(packed, in_features).isfinite()
    if not bool(finite.all()):
        raise ValueError(
            f"a scale is not finite: NaN or infinity in row {int((~finite).nonzero()[0, 0])}"
        )


def _unpack_awq_codes(words: Tensor) -> Tensor:
    """``int32 [m, k]`` -> codes in the order of ``out``, ``uint8 [m, 8 k]``."""
    nibbles = unpack_bits(view_as_bytes(words), 4)
    return nibbles.view(len(words), words.shape[1], 8)[:, :, _AWQ_PLACES].flatten(1)


def _build_affine_rows(stream: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """The fields of ``AffineCodec``'s rows (see ``affine``) side by side.

    A last word that the codes do not fill has zero bits, which are the codec's padding.
    """
    assert stream.shape[1] == align_to_4_bytes(stream.shape[1]), stream.shape
    return torch.cat((stream, view_as_bytes(scale), view_as_bytes(zero)), 1)
