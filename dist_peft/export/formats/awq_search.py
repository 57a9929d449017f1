"""AWQ's search for factors of columns (Lin et al. 2023, "Activation-aware Weight Quantization").

A product ``W x`` does not change if column ``i`` of ``W`` is multiplied by ``s_i`` and input ``i``
divided by it, and the second is part of the weights before: a norm's scales, or the rows of the
linear before::

    W x = (W diag(s)) (x / s)

Quantization of ``W diag(s)`` rounds a column with large ``s_i`` relatively finer, at the cost of
the other columns of its group. Columns matter by the size of their inputs, so that

    s = m^a / sqrt(max(m^a) min(m^a)),   m_i = mean |x_i|,   a in {0, 1/20, ..., 19/20}

and ``a`` is the one with the least error of the products on sample inputs, summed over the linears
that read the same input::

    sum of  || (decode(encode(W diag(s))) diag(1 / s) - W) x ||^2

``a = 0`` is plain rounding, so that the error on the samples is never larger. Unlike the paper's
code the error is that of each linear and not of the layer around them, and no weights are clipped.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_peft.quant.affine import AffineCodec

__all__ = ["FoundFactors", "InputSample", "search_factors"]

_STEPS = 20
_SMALLEST = 1e-4


@dataclass(frozen=True)
class InputSample:
    """Inputs of linears that read the same tensor.

    Attributes:
        rows: some of them, float32 ``[n, in]``.
        mean: mean absolute value of each column over all of them, float32 ``[in]``.
    """

    rows: Tensor
    mean: Tensor


@dataclass(frozen=True)
class FoundFactors:
    """The result of a search.

    Attributes:
        factors: ``s``, float32 ``[in]``; ones where plain rounding is best.
        error: of the products with ``factors``, relative to the sum of their squares.
        plain_error: the same of plain rounding.
    """

    factors: Tensor
    error: float
    plain_error: float


def search_factors(
    weights: Sequence[Tensor], inputs: InputSample, codec: AffineCodec
) -> FoundFactors:
    """Return the factors with the least error.

    Args:
        weights: of the linears that read ``inputs``, float32 ``[out, in]`` each.
        inputs: samples.
        codec: quantizes rows; its integer zeros are those that are stored.
    """
    size = sum(float((inputs.rows @ weight.T).square().sum()) for weight in weights)
    best: tuple[float, Tensor] | None = None
    plain = 0.0
    for step in range(_STEPS):
        factors = _make_factors(inputs.mean, step / _STEPS)
        error = sum(_measure_error(weight, factors, inputs.rows, codec) for weight in weights)
        if step == 0:
            plain = error
        if best is None or error < best[0]:
            best = error, factors
    assert best is not None
    return FoundFactors(best[1], best[0] / max(size, 1e-30), plain / max(size, 1e-30))


def _make_factors(mean: Tensor, power: float) -> Tensor:
    raised = mean.float().clamp_min(_SMALLEST) ** power
    return raised / (raised.max() * raised.min()).sqrt()


def _measure_error(weight: Tensor, factors: Tensor, rows: Tensor, codec: AffineCodec) -> float:
    columns = weight.shape[1]
    packed = codec.quantize_to_packed(weight * factors)
    decoded = codec.dequantize_rows(packed, columns, torch.float32) / factors
    return float((rows @ (decoded - weight).T).square().sum())
