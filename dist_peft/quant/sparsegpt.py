"""SparseGPT: prune weights so that the ones left make up for those that go.

Frantar & Alistarh 2023, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot".
``H = X^T X`` of the layer's inputs, damped by 1 % of its mean diagonal, and the upper triangular
``U`` of ``H^-1 = U^T U`` are those of GPTQ (``quant.gptq``), with the columns in their order. For
each block of 128 columns, the weights with the lowest error ``w^2 / U_jj^2`` in all rows together
are chosen. Then, column by column::

    e_i  = w_i where it is pruned, else 0         w_i -= e_i
    w_j -= e_i * U_ij / U_ii                      for all j > i

With a pattern N:M the choice is made in each row for M columns, when the first of them is reached.
A column that was never active (``H_ii = 0``) is set to zero first, as in the original code.

The original code applies the changes to later blocks as matrix products. Here each is applied at
once, elementwise: with the choice of a block, which is the same on all ranks
(``quant.sparsity``), a row depends on its weights alone, bit for bit.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dist_peft.quant.gptq import invert_to_upper, iterate_row_chunks
from dist_peft.quant.sparsity import Reduce, Sparsity, select_by_threshold, select_in_groups

__all__ = ["PruningFactor", "factorize_for_pruning", "prune_weight_rows"]

BLOCK_COLUMNS = 128
"""Columns whose pruned weights are chosen together."""


@dataclass(frozen=True)
class PruningFactor:
    """Inverse factor of a Hessian, as pruning needs it.

    Attributes:
        upper: float32 ``[in, in]``, ``U_ij / U_ii``; ones on the diagonal.
        diagonal: float32 ``[in]``, ``U_ii``; 0 where the column was never active.
    """

    upper: Tensor
    diagonal: Tensor

    @classmethod
    def allocate_empty(cls, columns: int, device: torch.device) -> "PruningFactor":
        """Room for a factor that another rank has made."""
        return cls(
            torch.empty(columns, columns, device=device), torch.empty(columns, device=device)
        )


def factorize_for_pruning(hessian: Tensor) -> PruningFactor:
    """Damp and factor a Hessian.

    Args:
        hessian: float64 ``[in, in]``, symmetric, positive semidefinite, in any unit; overwritten.

    Raises:
        ValueError: no Cholesky factor, even with the strongest damping.
    """
    idle = hessian.diagonal() == 0
    mean = float(hessian.diagonal().mean()) or 1.0
    hessian /= mean  # scores are compared with each other only; squares stay in float32's range
    backwards = hessian.flip(0, 1)
    del hessian
    upper = invert_to_upper(backwards, 1.0)
    del backwards
    diagonal = upper.diagonal().clone()
    upper /= diagonal.unsqueeze(1)
    return PruningFactor(upper.float().contiguous(), diagonal.masked_fill_(idle, 0).float())


@torch.no_grad()
def prune_weight_rows(
    weight: Tensor, factor: PruningFactor, sparsity: Sparsity, total_rows: int, reduce: Reduce
) -> Tensor:
    """Prune rows given the factor of their inputs' Hessian; a collective without a pattern.

    Args:
        weight: float ``[rows, in]``, this rank's rows of the layer, 0 allowed.
        total_rows: of the layer.
        reduce: sums integers over the ranks that share the layer.

    Returns:
        float32 ``[rows, in]``.
    """
    rows, count = weight.shape
    columns = weight.float().T.contiguous()  # column i is row i here: contiguous
    columns[factor.diagonal == 0] = 0
    chunks = list(iterate_row_chunks(rows, count, weight.device))
    width = count if sparsity.group else BLOCK_COLUMNS
    for start in range(0, count, width):
        stop = min(start + width, count)
        pruned: Tensor | None = None
        if not sparsity.group:
            wanted = sparsity.count_pruned(total_rows * (stop - start))
            scores = _compute_scores(columns[start:stop], factor.diagonal[start:stop])
            pruned = select_by_threshold(scores, wanted, reduce)
        for span in chunks:
            chosen = None if pruned is None else pruned[:, span.slice]
            _prune_block(columns[:, span.slice], factor, sparsity, (start, stop), chosen)
    return columns.T.contiguous()


def _prune_block(
    columns: Tensor,
    factor: PruningFactor,
    sparsity: Sparsity,
    block: tuple[int, int],
    chosen: Tensor | None,
) -> None:
    """Prune columns ``block`` of ``[in, n]`` in place, and change all later ones.

    Args:
        chosen: bool ``[block, n]``; None: chosen here, by the pattern.
    """
    start, stop = block
    group = sparsity.group
    for i in range(start, stop):
        if chosen is not None:
            own = chosen[i - start]
        else:
            if i % group == 0:
                scores = _compute_scores(columns[i : i + group], factor.diagonal[i : i + group])
                in_group = select_in_groups(scores.T, sparsity).T
            own = in_group[i % group]
        error = torch.where(own, columns[i], 0)
        columns[i].masked_fill_(own, 0)
        # two roundings, not a fused one: the same bits on every machine
        columns[i + 1 :] -= factor.upper[i, i + 1 :].unsqueeze(1) * error


def _compute_scores(columns: Tensor, diagonal: Tensor) -> Tensor:
    """Return ``w^2 / U_ii^2`` of ``[columns, n]``; 0 for a column that was never active."""
    safe = torch.where(diagonal == 0, 1, diagonal).unsqueeze(1)
    return (columns / safe).square()
