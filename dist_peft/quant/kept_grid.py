"""Other codes on the grid of rows that are packed already: scales and zeros stay.

The rows of a base that comes quantized (GPTQ, AWQ, compressed-tensors) have scales and zeros that
other libraries chose, and that its files keep::

    q = clamp(round(w / scale + zero), 0, 2**bits - 1)      scale, zero: those of the row

Of weights ``(q - zero) * scale`` this is ``q`` again. A group whose scale is 0 keeps its codes, as
does the padding of a row. Row-local and elementwise, like every codec.
"""

import torch
from torch import Tensor
from torch.nn import functional

from dist_peft.quant.codec_defaults import AffineRows

__all__ = ["count_changed_codes", "quantize_on_grid"]


def quantize_on_grid(values: Tensor, kept: Tensor, rows: AffineRows, in_features: int) -> Tensor:
    """Return ``values`` in the codes of ``kept``'s groups.

    Args:
        values: float ``[n, in]``.
        kept: ``uint8 [n, row_bytes]``, rows whose scales and zeros are used.
        rows: how they are split (``Codec.affine_rows``).
        in_features: ``in``.

    Returns:
        ``uint8 [n, row_bytes]``, with new codes.

    Raises:
        ValueError: a value is NaN or infinite.
    """
    if not bool(torch.isfinite(values).all()):
        row = int((~torch.isfinite(values)).any(1).nonzero()[0])
        raise ValueError(f"a value is not finite: NaN or infinity in row {row}")
    parts = rows.split_packed_rows(kept, in_features)
    scale, zero = (part.float().unsqueeze(-1) for part in (parts.scale, parts.zero))
    padded = functional.pad(values.float(), (0, parts.codes.shape[1] - in_features))
    groups = padded.unflatten(1, (parts.scale.shape[1], -1))
    codes = (groups / scale).add_(zero).round_().clamp_(0, 2**rows.bits - 1)
    own = parts.codes.view(codes.shape)
    codes = torch.where(scale == 0, own.float(), codes).to(torch.uint8).flatten(1)
    codes[:, in_features:] = parts.codes[:, in_features:]
    return rows.join_packed_rows(parts._replace(codes=codes), in_features)


def count_changed_codes(one: Tensor, other: Tensor, rows: AffineRows, in_features: int) -> int:
    """Return how many weights have another code in ``one`` than in ``other``, both packed."""
    codes, others = (rows.split_packed_rows(packed, in_features).codes for packed in (one, other))
    return int((codes != others)[:, :in_features].sum())
