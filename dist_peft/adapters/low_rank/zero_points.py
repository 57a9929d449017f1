"""Folding an adapter into the zeros of an affine base: exact, and the loss of rounding.

With one zero and one scale a row and group, and an adapter that adds the same ``D`` to all weights
of a group (QA-LoRA; ``D = s B A``, ``[rows, groups]``)::

    w     = (q - zero) scale
    w + D = (q - zero') scale        zero' = zero - D / scale        codes and scales stay

    bias' = bias + D                 where a format stores bias = -scale zero (MLX, GGUF Q4_1)

``zero'`` is a float32, computed in float64 and rounded once. A dequantized weight is then off by
less than ``2^-24 |zero'| scale``, as much as float32 rounds ``w`` itself where ``zero'`` is of the
size of the codes.

Back (``unmerge_from_zeros``): ``zero' + D / scale`` differs from ``zero`` by that one rounding, at
most ``2^-24 |zero'|``, and is rounded again to a possible value of ``zero``::

    integers (rtn, GPTQ)    to an integer: the very zero if |zero'| < 2^23
    float16 (HQQ)           to float16: the very zero if |zero'| < 2^12 |zero|, |zero| >= 2^-14

Packed rows keep zeros in fp16. Where these are trained (``adapter.through_zeros``), ``zero'`` is
rounded to fp16 and to a multiple of ``2^-14`` in the forward pass already (``move_packed_zeros``),
and an export copies it.

Integer zeros cannot hold the adapter. Rounding ``zero'`` to an integer changes a group only where
``|D| > scale / 2``, while adapters change weights by a small part of a step:
``measure_lost_share`` says how much of the adapter that erases.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from dist_peft.adapters.low_rank.blocked_product import add_blocked_product
from dist_peft.core.span import Span
from dist_peft.quant.codec_defaults import AffineParts, AffineRows

__all__ = ["measure_lost_share", "merge_into_zeros", "move_packed_zeros", "unmerge_from_zeros"]

_FINEST = 2.0**14
"""Trained zeros are multiples of one over this, so that ``code - zero`` is exact in float32: then
``code scale + bias`` is the same number as ``(code - zero) scale``, to the last bit."""

_INTEGERS_END = 2.0**23
"""float32 has steps of 1 from here on."""


def merge_into_zeros(parts: AffineParts, change: Tensor) -> AffineParts:
    """``parts`` with the float32 zeros that hold ``change`` [rows, groups]."""
    zero = parts.zero.double() - _change_in_steps(parts, change)
    return parts._replace(zero=zero.float())


def unmerge_from_zeros(parts: AffineParts, change: Tensor, *, integer: bool) -> AffineParts:
    """The parts that ``merge_into_zeros`` was given, bit for bit, with float16 zeros.

    Args:
        parts: merged.
        change: the same as in the merge.
        integer: whether the base's zeros are integers (else rounded as the module docstring says).

    Raises:
        ValueError: a zero is so large that an integer is not known to come back.
    """
    zero = parts.zero.double() + _change_in_steps(parts, change)
    if integer:
        if bool((parts.zero.abs() >= _INTEGERS_END).any()):
            raise ValueError("the adapter moved a zero beyond 2^23: its fraction is lost")
        zero = zero.round()
    return parts._replace(zero=zero.half())


def move_packed_zeros(
    packed: Tensor, B: Tensor, A: Tensor, span: Span, rows: AffineRows, in_features: int
) -> Tensor:
    """Return packed rows ``span`` with ``B A`` in their fp16 zeros: the same bytes at any cut.

    Args:
        packed: ``uint8 [len(span), row_bytes]``.
        B: ``[out, r]``, of the whole matrix.
        A: ``[r, groups]``, scaled, on the device of ``packed``.
        span: which rows these are.
        rows: how they are split (``Codec.affine_rows``).
        in_features: columns.

    Raises:
        ValueError: a zero is beyond fp16, NaN or infinite.
    """
    none = torch.zeros(len(span), A.shape[1], device=packed.device)
    parts = rows.split_packed_rows(packed, in_features)
    zero = merge_into_zeros(parts, add_blocked_product(none, B, A, span)).zero
    zero = (zero * _FINEST).round_().div_(_FINEST).half()
    if not bool(torch.isfinite(zero).all()):
        row = span.start + int((~torch.isfinite(zero)).any(1).nonzero()[0])
        raise ValueError(f"a zero of row {row} is beyond float16")
    return rows.join_packed_rows(parts._replace(zero=zero), in_features)


def measure_lost_share(pieces: Iterable[tuple[AffineParts, Tensor]], bits: int) -> float:
    """The share of an adapter that is lost when merged zeros are rounded to integers of ``bits``.

    Args:
        pieces: rows of the base (not merged) and their change, of as many weights as wanted.
        bits: of a zero, which is clamped to ``0 .. 2**bits - 1``.

    Returns:
        ``|| kept - D || / || D ||`` over all weights: 0 if nothing is lost, 1 if everything is;
        0 for an adapter that changes nothing.
    """
    lost, total = 0.0, 0.0
    for parts, change in pieces:
        exact = parts.zero.double() - _change_in_steps(parts, change)
        rounded = exact.round().clamp(0, 2**bits - 1)
        kept = (parts.zero.double() - rounded) * parts.scale.double()
        lost += float((kept - change.double()).square().sum())
        total += float(change.double().square().sum())
    return (lost / total) ** 0.5 if total else 0.0


def _change_in_steps(parts: AffineParts, change: Tensor) -> Tensor:
    """The change in units of the codes."""
    return change.to(parts.scale.device).double() / parts.scale.double()
