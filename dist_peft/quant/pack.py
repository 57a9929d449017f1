"""Codes of 2, 3, 4 or 8 bits in a dense bit stream.

The stream fills bytes from their least significant bit and lets codes cross byte borders
("LSB first"). Eight codes of ``bits`` bits are ``bits`` bytes. For 3 bits, codes a..h::

    byte 0          byte 1          byte 2
    7 6 5 4 3 2 1 0 7 6 5 4 3 2 1 0 7 6 5 4 3 2 1 0        (bit of the byte)
    c c b b b a a a f e e e d d d c h h h g g g f f

Read as little-endian words, 32 codes are ``bits`` uint32 words. This is the order of MLX, of
compressed-tensors ``pack-quantized`` and, transposed, of GPTQ ``qweight``.

``high_first`` swaps the two codes of a byte (4 bits only): the even code lies in the high nibble.
This is the order of bitsandbytes.

Packing reads neighbouring codes as one wider integer and shifts them together. Unpacking is a table
look-up: a byte is two codes of 4 bits or four of 2, a 12-bit piece of the stream is four codes of
3. The table can hold any value per code, so that ``lookup`` turns packed bytes directly into
numbers.
"""

import torch
from torch import Tensor

from dist_peft.quant.table_cache import cache_tables

__all__ = ["lookup_packed_values", "pack_bits", "unpack_bits"]

_WIDE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}
"""Bytes -> a type of that size: a table entry is gathered as one element, whatever it holds."""


def pack_bits(codes: Tensor, bits: int, high_first: bool = False) -> Tensor:
    """``uint8 [..., n]`` codes below ``2**bits`` -> ``uint8 [..., n * bits / 8]``.

    Raises:
        ValueError: ``n`` is not a multiple of 8, or a code needs more than ``bits`` bits.
    """
    _check_bit_order(bits, high_first)
    if codes.dtype != torch.uint8 or codes.shape[-1] % 8:
        raise ValueError(f"codes are uint8 [..., 8 k], not {codes.dtype} {list(codes.shape)}")
    if codes.numel() and bits < 8 and int(codes.max()) >= 2**bits:
        raise ValueError(f"code {int(codes.max())} does not fit into {bits} bits")
    if bits == 8:
        return codes.clone()
    flat = codes.reshape(-1)
    if flat.storage_offset() % 8:  # of a view as wider numbers
        flat = flat.clone()
    packed = _join_neighbours(flat, bits, high_first)
    return packed.view(*codes.shape[:-1], codes.shape[-1] * bits // 8)


def _join_neighbours(codes: Tensor, bits: int, high_first: bool) -> Tensor:
    """The stream of ``uint8 [8 k]`` codes. Two neighbours, read as one wider number, are moved
    together by one shift::

        . . . b  . . . a     int16 of two bytes, here of 4 bits
        . . . .  . . . b     shifted to the right by 8 - 4, whose low byte is ``b a`` with ``a``

    Results of 4 bits are joined again, of 6 bits twice.
    """
    pairs = codes.view(torch.int16)
    shifted = pairs << bits if high_first else pairs >> 8 - bits
    joined = shifted.add_(pairs >> 8) if high_first else shifted.bitwise_or_(pairs)
    narrow = joined.to(torch.uint8)
    if bits == 4:
        return narrow
    if bits == 2:
        return _join_neighbours(narrow, 4, high_first=False)
    sixes = narrow.view(torch.int16)
    twelves = ((sixes & 0x3F) | (sixes >> 2 & 0xFC0)).view(torch.int32)
    words = (twelves & 0xFFF) | (twelves >> 4 & 0xFFF000)
    return words.unsqueeze(1).view(torch.uint8)[:, :3].reshape(-1)


def unpack_bits(packed: Tensor, bits: int, high_first: bool = False) -> Tensor:
    """``uint8 [..., m]`` bytes -> ``uint8 [..., 8 m / bits]`` codes; inverse of ``pack_bits``."""
    return lookup_packed_values(packed, bits, tuple(range(2**bits)), torch.uint8, high_first)


def lookup_packed_values(
    packed: Tensor,
    bits: int,
    values: tuple[float, ...],
    dtype: torch.dtype = torch.float32,
    high_first: bool = False,
    groups: int | None = None,
) -> Tensor:
    """Unpack codes and put ``values[code]`` in their place.

    Args:
        packed: ``uint8 [..., m]``; for 3 bits ``m`` is a multiple of 3.
        bits: 2, 3, 4 or 8.
        values: ``2**bits`` numbers.
        dtype: type of the result.
        high_first: see the module.
        groups: of each row, of a matrix ``[rows, m]``.

    Returns:
        ``dtype [..., 8 m / bits]``, with ``groups`` ``[rows, groups, 8 m / bits / groups]``: a
        fresh tensor.
    """
    _check_bit_order(bits, high_first)
    if bits == 3 and packed.shape[-1] % 3:
        raise ValueError(f"3-bit codes come in 3 bytes; there are {packed.shape[-1]}")
    table = _build_lookup_table(bits, values, dtype, high_first, packed.device)
    index = _split_into_twelve_bits(packed) if bits == 3 else packed.int()
    found = table.index_select(0, index.flatten())
    count = packed.shape[-1] * 8 // bits
    shape = (
        (*packed.shape[:-1], count) if groups is None else (len(packed), groups, count // groups)
    )
    return found.view(dtype).view(shape)


def _split_into_twelve_bits(packed: Tensor) -> Tensor:
    """Three bytes of stream -> its lower and upper 12 bits, ``int32 [..., m / 3, 2]``."""
    pieces = packed.int().reshape(*packed.shape[:-1], packed.shape[-1] // 3, 3)
    first, middle, last = pieces.unbind(-1)
    return torch.stack((first | (middle & 15) << 8, middle >> 4 | last << 4), dim=-1)


@cache_tables
def _build_lookup_table(
    bits: int, values: tuple[float, ...], dtype: torch.dtype, high_first: bool, device: torch.device
) -> Tensor:
    """All values of an index (8 bits; 12 for 3-bit codes), one wide element an index."""
    width = 12 if bits == 3 else 8
    shifts = torch.arange(0, width, bits, device="cpu")
    if high_first:
        shifts = shifts.flip(0)
    codes = (torch.arange(2**width, device="cpu").unsqueeze(1) >> shifts) & (2**bits - 1)
    entries = torch.tensor(values, dtype=dtype, device="cpu")[codes]
    wide = _WIDE[entries.shape[1] * dtype.itemsize]
    return entries.view(wide).squeeze(1).to(device)


def _check_bit_order(bits: int, high_first: bool) -> None:
    if bits not in (2, 3, 4, 8):
        raise ValueError(f"codes have 2, 3, 4 or 8 bits, not {bits}")
    if high_first and bits != 4:
        raise ValueError(f"only 4-bit codes have a high-first order, not {bits}-bit codes")
