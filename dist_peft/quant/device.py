"""Packed rows -> dense weight on a GPU, in one launch of one Triton kernel.

The unit of all codecs is the octet: eight codes of ``bits`` bits are ``bits`` whole bytes, and as
group sizes are multiples of 8, an octet has one scale::

    row of packed bytes   | octet 0 | octet 1 | ...   | scales, zeros |
    program (row, part)   BLOCK octets of the row -> BLOCK x 8 weights
    thread                one word of ``bits`` bytes a time, eight shifts, one number for each code,
                          one product with the scale, one store of eight neighbours

The number of a code and the scale of its group::

    nf4      LEVELS[code]          float32, or the square of ``code * step + offset``
    affine   code - zero           float16
    mxfp4    E2M1                  2^(byte - 127)
    nvfp4    E2M1                  E4M3 / float32 of the row, correctly rounded
    fp8      E4M3                  float32

The bits of a small float (E2M1, E4M3), moved to the places of float32's, are the number times a
power of two, subnormal or not, as biases alone differ::

    E4M3   s eeee mmm    float32  s 0000eeee mmm00000000000000000000  =  number * 2^(7 - 127)

so that a shift and an exact product decode it. E4M3 has no infinity; its largest code is NaN.

A weight is read and written once: 0.52 bytes in and 2 out for NF4 with double quantization into
bfloat16, where the chunks of ``quant.kernels`` move 24 in 22 launches. Rows may lie anywhere: any
row stride, any alignment.

The bits are those of ``quant.kernels``: products and sums in float32, each rounded once. ``a * b +
c`` is not contracted to a fused multiply-add (``enable_fp_fusion``), and quotients are correctly
rounded (``tl.div_rn``; Triton's ``/`` is not).
Every load and store has a mask, as a kernel under Triton's interpreter that leaves its row ends the
process.

Triton is imported here and in ``quant.device_encode``; ``quant.device_choice`` decides who calls
them, and imports them then.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from dist_peft.quant.device_choice import RowLayout
from dist_peft.quant.kernels import NF4_LEVELS
from dist_peft.quant.nf4 import RUN_BLOCKS
from dist_peft.quant.table_cache import cache_tables

__all__ = ["EXACT_OPTIONS", "dequantize_rows", "enter_device"]

EXACT_OPTIONS = {"enable_fp_fusion": False}
"""Options of every launch: no product and sum in one rounding."""

_BLOCK_OCTETS = 256
_NUM_WARPS = 4

_RUN_BLOCKS: tl.constexpr = tl.constexpr(RUN_BLOCKS)


@triton.jit
def _load_number(row, offset, mask, BYTES: tl.constexpr, ALIGNED: tl.constexpr):
    """Little-endian ``uint32`` of 1 to 4 bytes at byte ``offset`` of a row."""
    if BYTES == 4 and ALIGNED:
        number = tl.load((row + offset).to(tl.pointer_type(tl.uint32)), mask=mask, other=0)
    elif BYTES == 2 and ALIGNED:
        short = tl.load((row + offset).to(tl.pointer_type(tl.uint16)), mask=mask, other=0)
        number = short.to(tl.uint32)
    else:
        number = tl.load(row + offset, mask=mask, other=0).to(tl.uint32)
        for i in tl.static_range(1, BYTES):
            byte = tl.load(row + offset + i, mask=mask, other=0).to(tl.uint32)
            number |= byte << (8 * i)
    return number


@triton.jit
def _load_half(row, offset, mask, ALIGNED: tl.constexpr):
    """float16 at byte ``offset`` of a row, as float32."""
    bits = _load_number(row, offset, mask, 2, ALIGNED).to(tl.uint16)
    return bits.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _load_float(row, offset, mask, ALIGNED: tl.constexpr):
    """float32 at byte ``offset`` of a row."""
    return _load_number(row, offset, mask, 4, ALIGNED).to(tl.float32, bitcast=True)


@triton.jit
def _load_nf4_scale(row, group, inside, scales, runs, DOUBLE: tl.constexpr, ALIGNED: tl.constexpr):
    """Scale of each octet's group: stored, or the square of ``u * step + offset``."""
    if DOUBLE:
        place = scales + group // _RUN_BLOCKS * 8
        offset = _load_float(row, place, inside, ALIGNED)
        step = _load_float(row, place + 4, inside, ALIGNED)
        code = tl.load(row + scales + 8 * runs + group, mask=inside, other=0)
        root = code.to(tl.float32) * step + offset
        scale = root * root
    else:
        scale = _load_float(row, scales + group * 4, inside, ALIGNED)
    return scale


@triton.jit
def _widen_small_floats(codes, EXPONENT: tl.constexpr, MANTISSA: tl.constexpr):
    """Codes ``uint32`` of a sign and these numbers of bits, to float32 (see the module)."""
    magnitude = codes & (2 ** (EXPONENT + MANTISSA) - 1)
    bits = magnitude << (23 - MANTISSA)
    if EXPONENT == 4:
        bits |= tl.where(magnitude == 0x7F, 0x7F800000, 0).to(tl.uint32)
    bits |= (codes >> (EXPONENT + MANTISSA)) << 31
    return bits.to(tl.float32, bitcast=True) * 2.0 ** (128 - 2 ** (EXPONENT - 1))


@triton.jit
def _load_power(row, offset, inside):
    """``2^(byte - 127)`` of a byte (E8M0), a subnormal for byte 0; NaN above byte 252."""
    byte = tl.load(row + offset, mask=inside, other=0).to(tl.uint32)
    bits = tl.where(byte == 0, 1 << 22, (byte << 23).to(tl.int32))
    bits = tl.where(byte > 252, 0x7FC00000, bits)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _load_nvfp4_scale(row, scales, group, groups, inside, ALIGNED: tl.constexpr):
    """Scale of each octet's group by the factor of the row, which is behind the padded scales."""
    stored = tl.load(row + scales + group, mask=inside, other=0).to(tl.uint32)
    place = (scales + groups + 3) // 4 * 4
    factor = _load_float(row, tl.zeros_like(group) + place, inside, ALIGNED)
    return tl.div_rn(_widen_small_floats(stored, 4, 3), factor)


@triton.jit
def _load_codes(row, octet, inside, BITS: tl.constexpr, KIND: tl.constexpr, ALIGNED: tl.constexpr):
    """The eight codes of each octet, ``uint32 [BLOCK, 8]``."""
    lane = tl.arange(0, 8)
    if BITS == 8:
        place = octet[:, None] * 8 + lane[None, :]
        codes = tl.load(row + place, mask=inside[:, None], other=0).to(tl.uint32)
    else:
        word = _load_number(row, octet * BITS, inside, BITS, ALIGNED)
        # the even code of an NF4 byte is in its high nibble
        position = lane ^ 1 if KIND == "nf4" else lane
        codes = (word[:, None] >> (position * BITS)[None, :].to(tl.uint32)) & (2**BITS - 1)
    return codes


@triton.jit
def _decode_kernel(
    packed, row_stride, weight, in_features, octets, scales, groups, runs, levels,
    BITS: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr, DOUBLE: tl.constexpr,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64)
    row = packed + index * row_stride
    octet = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = octet < octets
    codes = _load_codes(row, octet, inside, BITS, KIND, ALIGNED)
    group = octet // (GROUP // 8)
    if KIND == "nf4":
        scale = _load_nf4_scale(row, group, inside, scales, runs, DOUBLE, ALIGNED)
        table = tl.load(levels + tl.arange(0, 16))
        flat = tl.gather(table, tl.reshape(codes.to(tl.int32), (BLOCK * 8,)), 0)
        numbers = tl.reshape(flat, (BLOCK, 8)) * scale[:, None]
    elif KIND == "mxfp4":
        scale = _load_power(row, scales + group, inside)
        numbers = _widen_small_floats(codes, 2, 1) * scale[:, None]
    elif KIND == "nvfp4":
        scale = _load_nvfp4_scale(row, scales, group, groups, inside, ALIGNED)
        numbers = _widen_small_floats(codes, 2, 1) * scale[:, None]
    elif KIND == "fp8":  # a last octet that is cut ends in the scales, at least 4 bytes
        scale = _load_float(row, scales + group * 4, inside, ALIGNED)
        numbers = _widen_small_floats(codes, 4, 3) * scale[:, None]
    else:
        scale = _load_half(row, scales + group * 2, inside, ALIGNED)
        zero = _load_half(row, scales + (groups + group) * 2, inside, ALIGNED)
        numbers = (codes.to(tl.float32) - zero[:, None]) * scale[:, None]
    column = octet[:, None] * 8 + tl.arange(0, 8)[None, :]
    place = weight + index * in_features + column
    tl.store(place, numbers.to(weight.dtype.element_ty), mask=column < in_features)


def dequantize_rows(
    packed: Tensor, layout: RowLayout, in_features: int, dtype: torch.dtype
) -> Tensor:
    """Packed rows -> weight.

    Args:
        packed: ``uint8 [rows, row_bytes]``, rows at any stride and alignment.
        layout: where a row has its codes and scales.
        in_features: columns of the weight.
        dtype: float32, bfloat16 or float16.

    Returns:
        ``dtype [rows, in_features]``.
    """
    rows = packed.shape[0]
    weight = torch.empty(rows, in_features, dtype=dtype, device=packed.device)
    if not weight.numel():
        return weight
    if packed.stride(1) != 1:
        packed = packed.contiguous()
    octets = -(-in_features // 8)
    block = min(_BLOCK_OCTETS, triton.next_power_of_2(octets))
    with enter_device(packed):
        _decode_kernel[(rows, triton.cdiv(octets, block))](
            packed, packed.stride(0), weight, in_features, octets, layout.scales, layout.groups,
            layout.runs, _copy_levels(packed.device) if layout.kind == "nf4" else None,
            BITS=layout.bits, GROUP=layout.group_size, KIND=layout.kind, DOUBLE=layout.runs > 0,
            ALIGNED=packed.data_ptr() % 4 == 0 and packed.stride(0) % 4 == 0, BLOCK=block,
            num_warps=_NUM_WARPS, **EXACT_OPTIONS,
        )  # fmt: skip
    return weight


def enter_device(tensor: Tensor) -> AbstractContextManager[None]:
    """Make the tensor's GPU the present one, on which Triton launches."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@cache_tables
def _copy_levels(device: torch.device) -> Tensor:
    """The levels of NF4 on a device, float32 ``[16]``."""
    return torch.tensor(NF4_LEVELS, device=device)
