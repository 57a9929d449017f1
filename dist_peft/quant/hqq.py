"""Half-quadratic quantization: a better zero for a group, without calibration data.

Rounding to nearest takes the zero from the group's ends. HQQ (Badri & Shaji 2023, "Half-Quadratic
Quantization of Large Machine Learning Models") keeps the scale and looks for the zero whose errors
have the least lp norm, ``p < 1``, which forgives a few large errors (outliers) and makes the many
others smaller. With ``u = w / scale`` (weights in steps) and ``Q = 2**bits - 1``::

    minimize over z   sum |u - (q - z)|**p           q = clamp(round(u + z), 0, Q)

A second variable ``e`` for the errors splits this into two steps that have closed forms, repeated
20 times while the penalty ``beta`` grows from 10 by 1 % each time::

    r = u - (q - z)
    e = sign(r) * max(0, |r| - |r|**(p - 1) / beta)  generalized soft threshold: the outliers
    z = mean(q - u + e)                              least squares for the rest

The zero is a fraction. It is rounded to fp16, as it is stored, and judged so; the best zero met is
kept, group by group. The start is the integer zero of rounding to nearest, so in the lp norm no
group ends up worse than that.

Rows stay independent bit for bit. Each operation is elementwise and correctly rounded (sums are
added up pairwise by hand), so the result depends on neither chunks, threads nor device.

Differences to the authors' code: ``p`` is 3/4 instead of 0.7, since ``|r|**(p - 1)`` is then two
square roots and a division, while ``pow`` differs in the last bit between vector and scalar code.
Errors are measured in steps, not in weights, so the scale of the weights does not matter (with
weights of 0.02 and ``beta = 10`` the authors' threshold removes every error). No early stop: theirs
looks at the whole tensor, and rows would depend on each other. The range always holds 0.
"""

import torch
from torch import Tensor

from dist_peft.quant.exact_math import exact_sqrt
from dist_peft.quant.packed_rows import divide_exactly

__all__ = ["optimize_zero_points"]

BETA, GROWTH, ITERATIONS = 10.0, 1.01, 20


def optimize_zero_points(
    groups: Tensor, scale: Tensor, zero: Tensor, real: Tensor, bits: int
) -> Tensor:
    """The zero of each group by half-quadratic iterations from ``zero``.

    Args:
        groups: float32 ``[rows, groups, group_size]``.
        scale: float16 ``[rows, groups]``, kept.
        zero: float16 ``[rows, groups]``, the start.
        real: bool ``[groups, group_size]``; False at the padding of the row, which does not count.
        bits: of a code.

    Returns:
        float16 ``[rows, groups]``.
    """
    steps = groups / scale.float().unsqueeze(-1)
    # the same in every row: real weights of each group
    count = _sum_in_fixed_order(real.float()).clamp(min=1)
    best, beta = zero, BETA
    residual, codes = _compute_residual(steps, zero, bits)
    least = _compute_lp_norm(residual, real)
    for _ in range(ITERATIONS):
        outliers = _shrink_residual(residual, beta)
        moved = torch.where(real, codes - steps + outliers, 0.0)
        zero = (_sum_in_fixed_order(moved) / count).half()
        residual, codes = _compute_residual(steps, zero, bits)
        norm = _compute_lp_norm(residual, real)
        better = norm < least
        best, least = torch.where(better, zero, best), torch.where(better, norm, least)
        beta *= GROWTH
    return best


def _compute_residual(steps: Tensor, zero: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """``u - (q - z)`` and ``q``."""
    shift = zero.float().unsqueeze(-1)
    codes = (steps + shift).round_().clamp_(0, 2**bits - 1)
    return steps - (codes - shift), codes


def _shrink_residual(residual: Tensor, beta: float) -> Tensor:
    size = residual.abs()
    # an error of 0 has an infinite threshold, so it is no outlier
    threshold = divide_exactly(exact_sqrt(exact_sqrt(size)).reciprocal_(), beta)
    return residual.sign() * (size - threshold).clamp_(min=0)


def _compute_lp_norm(residual: Tensor, real: Tensor) -> Tensor:
    """``sum |r|**0.75`` over the real weights of each group."""
    root = exact_sqrt(residual.abs())
    return _sum_in_fixed_order(torch.where(real, root * exact_sqrt(root), 0.0))


def _sum_in_fixed_order(numbers: Tensor) -> Tensor:
    """Sum over the last dimension, halves added to halves: one order of additions everywhere."""
    while (width := numbers.shape[-1]) > 1:
        half = width // 2
        folded = numbers[..., :half] + numbers[..., half : 2 * half]
        if width % 2:
            folded[..., 0] += numbers[..., -1]
        numbers = folded
    return numbers.squeeze(-1)
