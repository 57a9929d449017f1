"""Dense weight -> packed rows on a GPU: one launch for INT, two for NF4 with double quantization.

A program has ``BLOCK`` whole groups of a row: it finds their statistics, divides, and packs eight
codes into one word, so that a weight is read once and its code written once. Chunks are not needed,
and the host waits once a weight, to know that all statistics are finite.

The bytes are those of ``quant.nf4`` and ``quant.affine``:

    quotients     ``tl.div_rn``, correctly rounded; Triton's ``/`` is not
    square root   ``tl.sqrt_rn``
    halves        to even: ``(x + 1.5 * 2^23) - 1.5 * 2^23`` for ``|x| < 2^22``; no builtin rounds
    maximum       of magnitudes by their bits as integers: a GPU's float maximum would pass over NaN

Weights with NaN, infinity or a scale beyond float16 give no result here. The caller then encodes by
torch, which names the row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dist_peft.quant.device import EXACT_OPTIONS, enter_device
from dist_peft.quant.device_choice import RowLayout
from dist_peft.quant.nf4 import RUN_BLOCKS, list_nf4_borders
from dist_peft.quant.packed_rows import read_packed_field

__all__ = ["LARGEST_GROUP", "quantize_affine_rows", "quantize_nf4_rows"]

LARGEST_GROUP = 4096
"""Weights of a group that the registers of a program can hold."""

_TILE = 2048
_NUM_WARPS = 4

_RUN_BLOCKS: tl.constexpr = tl.constexpr(RUN_BLOCKS)
_BORDERS: tl.constexpr = tl.constexpr(tuple(list_nf4_borders()))
_INFINITY_BITS: tl.constexpr = tl.constexpr(0x7F800000)
_MAGNITUDE_BITS: tl.constexpr = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _round_to_even(x):
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _find_largest_bits(values):
    """Bits of the largest magnitude of each group, ``int32 [BLOCK]``; those of a NaN exceed all."""
    bits = values.to(tl.int32, bitcast=True) & _MAGNITUDE_BITS
    return tl.max(tl.max(bits, 2), 1)


@triton.jit
def _load_groups(
    weight, row_stride, group, in_features, GROUP: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """Groups as float32 ``[BLOCK, WIDTH / 8, 8]``, filled up with zeros."""
    index = tl.program_id(0).to(tl.int64)
    inner = tl.arange(0, WIDTH // 8)[None, :, None] * 8 + tl.arange(0, 8)[None, None, :]
    column = group[:, None, None] * GROUP + inner
    inside = (column < in_features) & (inner < GROUP)
    place = weight + index * row_stride + column
    return tl.load(place, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store_codes(
    packed, row_bytes, group, groups, codes,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, NF4: tl.constexpr,
):  # fmt: skip
    """Pack ``int32 [BLOCK, WIDTH / 8, 8]`` codes, an octet a word, into the packed row."""
    row = packed + tl.program_id(0).to(tl.int64) * row_bytes
    octet = tl.arange(0, WIDTH // 8)
    inside = (group < groups)[:, None] & (octet * 8 < GROUP)[None, :]
    lane = tl.arange(0, 8)
    place = (group * (GROUP // 8))[:, None] + octet[None, :]
    if BITS == 8:
        target = row + place[:, :, None] * 8 + lane[None, None, :]
        tl.store(target, codes.to(tl.uint8), mask=inside[:, :, None])
    else:
        position = lane ^ 1 if NF4 else lane
        word = tl.sum(codes << (position * BITS)[None, None, :], 2).to(tl.uint32, bitcast=True)
        target = row + place * BITS
        if BITS == 4:
            tl.store(target.to(tl.pointer_type(tl.uint32)), word, mask=inside)
        elif BITS == 2:
            tl.store(target.to(tl.pointer_type(tl.uint16)), word.to(tl.uint16), mask=inside)
        else:
            for i in tl.static_range(BITS):
                tl.store(target + i, (word >> (8 * i)).to(tl.uint8), mask=inside)


@triton.jit
def _encode_nf4_kernel(
    weight, row_stride, packed, row_bytes, absmax, in_features, groups,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    values = _load_groups(weight, row_stride, group, in_features, GROUP, WIDTH)
    largest = _find_largest_bits(values).to(tl.float32, bitcast=True)
    # a bare 1e-38, subnormal in float32, would be float64
    least = tl.full((BLOCK,), 1e-38, tl.float32)
    inverse = tl.div_rn(tl.full((BLOCK,), 1.0, tl.float32), tl.maximum(largest, least))
    scaled = values * inverse[:, None, None]
    codes = tl.zeros(scaled.shape, tl.int32)
    for i in tl.static_range(15):
        codes += (scaled > _BORDERS[i]).to(tl.int32)
    _store_codes(packed, row_bytes, group, groups, codes, GROUP, WIDTH, 4, True)
    index = tl.program_id(0).to(tl.int64)
    tl.store(absmax + index * groups + group, largest, mask=group < groups)


@triton.jit
def _encode_absmax_kernel(absmax, packed, row_bytes, scales, groups, runs):
    """The second level: one run of a row a program."""
    index, run = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = packed + index * row_bytes + scales
    group = run * _RUN_BLOCKS + tl.arange(0, _RUN_BLOCKS)
    real = group < groups
    root = tl.sqrt_rn(tl.load(absmax + index * groups + group, mask=real, other=0.0))
    offset = tl.min(tl.where(real, root, float("inf")), 0)
    span = tl.max(root, 0) - offset
    step = tl.div_rn(span, tl.full((), 255.0, tl.float32))
    divisor = tl.where(step > 0.0, step, 1.0)
    codes = tl.div_rn(root - offset, tl.zeros((_RUN_BLOCKS,), tl.float32) + divisor)
    codes = tl.minimum(_round_to_even(codes), 255.0)
    numbers = (row + run * 8).to(tl.pointer_type(tl.float32))
    tl.store(numbers, offset)
    tl.store(numbers + 1, step)
    # zeros up to the row's end, fewer than four
    kept = tl.where(real, codes, 0.0).to(tl.int32).to(tl.uint8)
    tl.store(row + 8 * runs + group, kept, mask=scales + 8 * runs + group < row_bytes)


@triton.jit
def _encode_affine_kernel(
    weight, row_stride, packed, row_bytes, in_features, groups, scales,
    BITS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    values = _load_groups(weight, row_stride, group, in_features, GROUP, WIDTH)
    low = tl.minimum(tl.min(tl.min(values, 2), 1), 0.0)
    high = tl.maximum(tl.max(tl.max(values, 2), 1), 0.0)
    steps = tl.full((BLOCK,), 2**BITS - 1, tl.float32)
    exact = tl.maximum(tl.div_rn(high - low, steps), 2.0**-24)
    exact = tl.where(high > low, exact, 1.0)
    exact = tl.where(_find_largest_bits(values) >= _INFINITY_BITS, float("inf"), exact)
    half = exact.to(tl.float16)
    scale = half.to(tl.float32)
    zero = tl.minimum(_round_to_even(tl.div_rn(0.0 - low, scale)), steps)
    spread = tl.zeros(values.shape, tl.float32) + scale[:, None, None]
    codes = _round_to_even(tl.div_rn(values, spread)) + zero[:, None, None]
    codes = tl.minimum(tl.maximum(codes, 0.0), 2.0**BITS - 1.0).to(tl.int32)
    _store_codes(packed, row_bytes, group, groups, codes, GROUP, WIDTH, BITS, False)
    row = packed + tl.program_id(0).to(tl.int64) * row_bytes + scales
    tl.store(row.to(tl.pointer_type(tl.float16)) + group, half, mask=group < groups)
    # -0.0 where no weight is negative
    bits = tl.where(low < 0.0, zero.to(tl.float16).to(tl.uint16, bitcast=True), 0x8000)
    target = row.to(tl.pointer_type(tl.uint16)) + groups + group
    tl.store(target, bits.to(tl.uint16), mask=group < groups)


def quantize_nf4_rows(weight: Tensor, layout: RowLayout) -> Tensor | None:
    """Encode as ``Nf4Codec`` does.

    Args:
        weight: float32, bfloat16 or float16 ``[rows, in]``, at least one weight.
        layout: of the packed rows; groups of at most ``LARGEST_GROUP`` weights.

    Returns:
        ``uint8 [rows, row_bytes]``; None where a weight is not finite.
    """
    weight, packed = _prepare_rows(weight, layout)
    rows, in_features = weight.shape
    absmax = torch.empty(rows, layout.groups, device=weight.device)
    width, block, warps = _choose_tile(layout)
    with enter_device(weight):
        _encode_nf4_kernel[(rows, triton.cdiv(layout.groups, block))](
            weight, weight.stride(0), packed, layout.row_bytes, absmax, in_features, layout.groups,
            GROUP=layout.group_size, WIDTH=width, BLOCK=block, num_warps=warps, **EXACT_OPTIONS,
        )  # fmt: skip
        if layout.runs:
            _encode_absmax_kernel[(rows, layout.runs)](
                absmax, packed, layout.row_bytes, layout.scales, layout.groups, layout.runs,
                num_warps=_NUM_WARPS, **EXACT_OPTIONS,
            )  # fmt: skip
        else:
            packed[:, layout.scales :] = absmax.view(torch.uint8)
    return packed if bool(absmax.isfinite().all()) else None


def quantize_affine_rows(weight: Tensor, layout: RowLayout) -> Tensor | None:
    """Encode as ``AffineCodec`` does by rounding to nearest (``rtn``).

    Args:
        weight, layout: as in ``quantize_nf4_rows``.

    Returns:
        ``uint8 [rows, row_bytes]``; None where a weight or a scale is not finite.
    """
    weight, packed = _prepare_rows(weight, layout)
    rows, in_features = weight.shape
    width, block, warps = _choose_tile(layout)
    stream = layout.groups * layout.group_size * layout.bits // 8
    if stream < layout.scales:
        packed[:, stream : layout.scales] = 0
    with enter_device(weight):
        _encode_affine_kernel[(rows, triton.cdiv(layout.groups, block))](
            weight, weight.stride(0), packed, layout.row_bytes, in_features, layout.groups,
            layout.scales, BITS=layout.bits, GROUP=layout.group_size, WIDTH=width, BLOCK=block,
            num_warps=warps, **EXACT_OPTIONS,
        )  # fmt: skip
    scales = read_packed_field(packed, layout.scales, layout.groups, torch.float16)
    return packed if bool(scales.isfinite().all()) else None


def _prepare_rows(weight: Tensor, layout: RowLayout) -> tuple[Tensor, Tensor]:
    """Return the weight with neighbouring columns, and unfilled packed rows."""
    weight = weight.detach()
    if weight.stride(1) != 1:
        weight = weight.contiguous()
    shape = (weight.shape[0], layout.row_bytes)
    return weight, torch.empty(shape, dtype=torch.uint8, device=weight.device)


def _choose_tile(layout: RowLayout) -> tuple[int, int, int]:
    """Return weights that a group is filled up to, groups of a program, and its warps."""
    width = triton.next_power_of_2(layout.group_size)
    block = max(1, min(_TILE // width, triton.next_power_of_2(layout.groups)))
    return width, block, _NUM_WARPS * max(1, width // _TILE)
