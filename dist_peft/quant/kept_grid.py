"""Other codes on the grid of rows that are packed already: scales and zeros stay.

The rows of a base that comes quantized have scales (and zeros) that other libraries chose, and that
its files keep. Integers (GPTQ, AWQ, compressed-tensors)::

    q = clamp(round(w / scale + zero), 0, 2**bits - 1)      scale, zero: those of the row

Formats of levels (NF4, FP4, MXFP4, NVFP4), of 8-bit floats and of signed bytes::

    q = the code whose value is nearest to w / scale

Of decoded weights this is ``q`` again. A group whose scale is 0 keeps its codes, as does the
padding of a row; a zero keeps its sign where the format has two. Row-local and elementwise, like
every codec. The codec says how (``Codec.grid_rows``).
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from dist_peft.quant.codec_defaults import AffineRows, GridRows
from dist_peft.quant.pack import pack_bits, unpack_bits

__all__ = [
    "count_changed_codes",
    "encode_nearest_on_grid",
    "encode_parts_on_grid",
    "quantize_on_grid",
]


def quantize_on_grid(values: Tensor, kept: Tensor, rows: GridRows, in_features: int) -> Tensor:
    """Return ``values`` in codes on the scales of ``kept``.

    Args:
        values: float ``[n, in]``.
        kept: ``uint8 [n, row_bytes]``, rows whose scales and zeros are used.
        rows: how codes are chosen (``Codec.grid_rows``).
        in_features: ``in``.

    Returns:
        ``uint8 [n, row_bytes]``, with new codes.

    Raises:
        ValueError: a value is NaN or infinite.
    """
    if not bool(torch.isfinite(values).all()):
        row = int((~torch.isfinite(values)).any(1).nonzero()[0])
        raise ValueError(f"a value is not finite: NaN or infinity in row {row}")
    return rows.encode_on_grid(values, kept, in_features)


def encode_parts_on_grid(
    values: Tensor, kept: Tensor, rows: AffineRows, in_features: int
) -> Tensor:
    """The same for integers with scales and zeros, which ``rows`` splits."""
    parts = rows.split_packed_rows(kept, in_features)
    scale, zero = (part.float().unsqueeze(-1) for part in (parts.scale, parts.zero))
    padded = functional.pad(values.float(), (0, parts.codes.shape[1] - in_features))
    groups = padded.unflatten(1, (parts.scale.shape[1], -1))
    codes = (groups / scale).add_(zero).round_().clamp_(0, 2**rows.bits - 1)
    own = parts.codes.view(codes.shape)
    codes = torch.where(scale == 0, own.float(), codes).to(torch.uint8).flatten(1)
    codes[:, in_features:] = parts.codes[:, in_features:]
    return rows.join_packed_rows(parts._replace(codes=codes), in_features)


def encode_nearest_on_grid(
    values: Tensor,
    kept: Tensor,
    scale: Tensor,
    columns: int,
    find_nearest: Callable[[Tensor], Tensor],
    *,
    bits: int,
    group_size: int,
    high_first: bool = False,
    zero_mask: int = 0,
) -> Tensor:
    """The same for rows that begin with codes of values that a scale multiplies.

    Args:
        scale: ``float32 [n, groups]``.
        columns: codes of a row, with its padding.
        find_nearest: ``values / scale`` -> ``uint8`` codes, same shape.
        bits: of a code, 4 or 8.
        group_size: columns that share a scale.
        high_first: the even code of a byte is in its high nibble.
        zero_mask: bits of a code that are 0 in both of its zeros; 0: the format has one.
    """
    size = columns * bits // 8
    padded = functional.pad(values.float(), (0, columns - values.shape[1]))
    wide = scale[:, torch.arange(columns, device=scale.device) // group_size]
    found = find_nearest(padded / torch.where(wide == 0, 1.0, wide))
    own = kept[:, :size] if bits == 8 else unpack_bits(kept[:, :size], bits, high_first)
    stays = wide == 0
    if zero_mask:
        stays |= ((found & zero_mask) == 0) & ((own & zero_mask) == 0)
    codes = torch.where(stays, own, found)
    packed = kept.clone()
    packed[:, :size] = codes if bits == 8 else pack_bits(codes, bits, high_first)
    return packed


def count_changed_codes(one: Tensor, other: Tensor, rows: GridRows, in_features: int) -> int:
    """Return how many weights have another code in ``one`` than in ``other``, both packed; of
    4-bit codes ``in_features`` is even."""
    bits = rows.code_bits
    size = -(-in_features * bits // 24) * 3 if bits == 3 else -(-in_features * bits // 8)
    codes, others = (
        packed[:, :size] if bits == 8 else unpack_bits(packed[:, :size], bits)
        for packed in (one, other)
    )
    return int((codes != others)[:, :in_features].sum())
