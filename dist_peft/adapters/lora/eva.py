"""EVA: ``A`` starts as the directions in which a linear's inputs vary most.

EVA (Paischer et al. 2024, "One Initialization to Rule them All: Fine-tuning via Explained Variance
Adaptation"). With the inputs ``x_1 ... x_n`` of a linear on training text and their mean ``m``::

    C = sum_t (x_t - m) (x_t - m)^T           A = the r leading eigenvectors of C, as rows
    explained variance of component i:        lambda_i / trace C
    B = 0                                     training starts at the base

The paper finds the eigenvectors as right singular vectors of the centered inputs, by an incremental
SVD with a stopping rule. Here ``C`` is summed exactly (``quant.fixed_point``) and decomposed once,
which depends neither on the order of batches nor on the number of ranks. ``C`` comes from the Gram
matrix of the inputs with a column of ones, ``[x, 1]``.

**Ranks.** With ``rho`` above 1 each linear has up to ``round(r rho)`` components, and the budget,
the sum of all ``r``, goes to the components that explain the largest shares (paper, section 3.3).
The scaling ``s`` stays that of ``r``, as with PEFT's ``adjust_scaling_factors``.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

__all__ = ["compute_eva_components", "redistribute_ranks", "with_ones_column"]


def with_ones_column(inputs: Tensor) -> Tensor:
    """``[n, in]`` of any float type -> float64 ``[n, in + 1]``."""
    return torch.cat([inputs.double(), inputs.new_ones(len(inputs), 1, dtype=torch.float64)], 1)


def compute_eva_components(gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the leading components and the share of the variance that each explains.

    Args:
        gram: float64 ``[in + 1, in + 1]``, ``[X, 1]^T [X, 1]``.
        rank: number of components, at most ``in``.

    Returns:
        ``[rank, in]``, orthonormal rows, the largest entry of each positive; ``[rank]``.

    Raises:
        ValueError: fewer inputs than components and their mean need, or inputs that do not vary.
    """
    count = round(float(gram[-1, -1]))
    if count <= rank:
        raise ValueError(f"{count} inputs are too few for {rank} components")
    sums = gram[:-1, -1]
    centered = gram[:-1, :-1] - torch.outer(sums, sums) / count
    variance = float(centered.diagonal().sum())
    if variance <= 0:
        raise ValueError("the inputs do not vary")
    values, vectors = torch.linalg.eigh((centered + centered.T) / 2)
    components = vectors[:, -rank:].flip(1).T.contiguous()
    components *= components.gather(1, components.abs().argmax(1, keepdim=True)).sign()
    return components, values[-rank:].flip(0).clamp_min(0) / variance


def redistribute_ranks(
    shares: Mapping[str, Sequence[float]], ranks: Mapping[str, int]
) -> dict[str, int]:
    """Give the sum of ``ranks`` to the components that explain most; some linears may get none.

    Args:
        shares: linear -> explained share of each component that it may have, descending.
        ranks: linear -> its rank without redistribution.

    Returns:
        Linear -> its rank. Of equal shares that of the linear listed first is taken.
    """
    ordered = sorted((-share, place) for place, own in enumerate(shares.values()) for share in own)
    names = list(shares)
    found = dict.fromkeys(names, 0)
    for _, place in ordered[: sum(ranks.values())]:
        found[names[place]] += 1
    return found
