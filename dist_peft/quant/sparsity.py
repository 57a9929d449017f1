"""Which weights of a matrix are set to zero: by magnitude, by Wanda's score, and the patterns.

A sparsity is a share of the weights, or a pattern N:M: of each M neighbouring weights of a row at
most N are not zero (Mishra et al. 2021, "Accelerating Sparse Deep Neural Networks"). The score of a
weight says how much the layer's output changes without it; the lowest ones are pruned::

    magnitude    |W_ij|                      compared within the whole matrix
    wanda        |W_ij| * ||x_j||_2          compared within each row
    sparsegpt    w^2 / U_jj^2                ``quant.sparsegpt``

Wanda: Sun et al. 2024, "A Simple and Effective Pruning Approach for Large Language Models". Its
choice is row-local. A share of the whole matrix needs one threshold for all of its rows, which lie
on several ranks: ``find_kth_smallest`` counts the scores by their bits, 16 at a time, and adds up
counts, so that the threshold is the same number however rows are split.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "Sparsity",
    "find_kth_smallest",
    "select_by_threshold",
    "select_in_groups",
    "select_in_rows",
]

Reduce = Callable[[Tensor], Tensor]
"""Sums an integer tensor over the ranks that share a matrix."""

_HALF_BITS = 16
_LARGEST_GROUP = 256


@dataclass(frozen=True)
class Sparsity:
    """A share of weights that are zero, or a pattern.

    Attributes:
        share: of all weights, above 0 and below 1.
        group: M of a pattern N:M; 0: no pattern.
        pruned: M - N, the zeros of each group.
    """

    share: float
    group: int = 0
    pruned: int = 0

    @classmethod
    def parse(cls, text: str) -> "Sparsity":
        """Return the sparsity of ``0.5`` or ``2:4``.

        Raises:
            ValueError: neither, or one that prunes nothing or everything.
        """
        if match := re.fullmatch(r"([0-9]{1,4}):([0-9]{1,4})", text.strip()):
            kept, group = int(match[1]), int(match[2])
            if not 0 < kept < group <= _LARGEST_GROUP:
                raise ValueError(
                    f"{text} is no pattern N:M with 0 < N < M <= {_LARGEST_GROUP}, where N of M "
                    "neighbouring weights are kept, such as 2:4"
                )
            return cls((group - kept) / group, group, group - kept)
        try:
            share = float(text)
        except ValueError:
            share = -1.0
        if not 0 < share < 1:
            raise ValueError(
                f"{text} is neither a share of the weights between 0 and 1, such as 0.5, nor a "
                "pattern such as 2:4"
            )
        return cls(share)

    def __str__(self) -> str:
        return f"{self.group - self.pruned}:{self.group}" if self.group else f"{self.share:g}"

    def count_pruned(self, weights: int) -> int:
        """Return how many of ``weights`` are pruned, rounded down."""
        return int(weights * self.share)


def select_in_rows(scores: Tensor, count: int) -> Tensor:
    """Select the ``count`` lowest scores of each row; of equal ones those in front.

    Args:
        scores: ``[rows, in]``.

    Returns:
        bool ``[rows, in]``.
    """
    lowest = scores.argsort(dim=-1, stable=True)[..., :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, lowest, True)


def select_in_groups(scores: Tensor, sparsity: Sparsity) -> Tensor:
    """Select the lowest scores of each group of a pattern.

    Args:
        scores: ``[rows, in]``, ``in`` a multiple of ``sparsity.group``.

    Returns:
        bool ``[rows, in]``.
    """
    groups = scores.reshape(-1, sparsity.group)
    return select_in_rows(groups, sparsity.pruned).view(scores.shape)


def select_by_threshold(scores: Tensor, count: int, reduce: Reduce) -> Tensor:
    """Select the ``count`` lowest scores of a matrix whose rows lie on several ranks.

    All scores that equal the highest selected one are selected.

    Args:
        scores: float32, this rank's, not negative; none allowed.
        count: of the whole matrix.

    Returns:
        bool, shaped like ``scores``.
    """
    if count < 1:
        return torch.zeros_like(scores, dtype=torch.bool)
    return scores <= find_kth_smallest(scores, count, reduce)


def find_kth_smallest(values: Tensor, k: int, reduce: Reduce) -> Tensor:
    """Return the ``k``-th smallest (from 1) of all ranks' values; a collective.

    Args:
        values: float32, this rank's, neither negative nor NaN.

    Returns:
        float32 ``[]``, the same bits on every rank.
    """
    assert values.dtype == torch.float32
    bits = values.flatten().view(torch.int32)  # ordered like the values, as none is negative
    high, left = bits >> _HALF_BITS, k
    upper, left = _find_bin(high, left, reduce)
    lower, _ = _find_bin(bits[high == upper] & (2**_HALF_BITS - 1), left, reduce)
    found = torch.tensor([upper << _HALF_BITS | lower], dtype=torch.int32, device=values.device)
    return found.view(torch.float32)[0]


def _find_bin(numbers: Tensor, k: int, reduce: Reduce) -> tuple[int, int]:
    """Return the number with the ``k``-th rank, and that rank among its equals."""
    counts = reduce(torch.bincount(numbers, minlength=2**_HALF_BITS))
    ends = counts.cumsum(0)
    number = int(torch.searchsorted(ends, k))
    return number, k - (int(ends[number - 1]) if number else 0)
