"""Low-rank pieces of a matrix whose rows lie on several ranks.

``W`` is ``[out, in]``; a rank holds some of its rows. A product ``B A`` of rank ``r`` has

    A [r, in]    the same on every rank
    B [out, r]   cut into rows as W is

so that ``W - s B A`` needs no communication. The ``r`` leading singular vectors need little
(randomized subspace iteration, Halko, Martinsson, Tropp 2011, algorithm 4.4, on ``W^T W``)::

    V <- orthonormal random [in, k],  k = 2 r + 8
    repeat:  V <- qr( sum over ranks of W_rank^T (W_rank V) )
    the eigenvectors P of V^T (W^T W) V give right singular vectors V P and squared singular values

Only ``[in, k]`` matrices are summed, in float64; every rank then factors the same matrix. The
result therefore depends on the number of ranks only through the order of float64 additions. Each
right singular vector gets the sign that makes its largest entry positive.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dist_peft.core.span import Span
from dist_peft.model.adapter_module import Reduce

__all__ = ["LowRankFactors", "add_factor_product", "compute_top_singular"]

_CHUNK_ELEMENTS = 2**18  # of a float64 temporary: 2 MiB
_NO_SIGNAL = (
    1e-7  # singular values below this share of the largest are rounding errors of V^T W^T W V
)


@dataclass(frozen=True)
class LowRankFactors:
    """The product ``B A``: ``A`` [r, in] whole, ``B`` [rows, r] for this rank's rows."""

    A: Tensor
    B: Tensor

    def scale_factors(self, factor: float) -> "LowRankFactors":
        """``factor`` (positive) times the product, shared evenly by both factors."""
        return LowRankFactors(self.A * factor**0.5, self.B * factor**0.5)

    def to_float32(self) -> "LowRankFactors":
        return LowRankFactors(self.A.float(), self.B.float())


def add_factor_product(rows: Tensor, B: Tensor, A: Tensor, scaling: float) -> Tensor:
    """``rows + scaling * B A`` in float32, computed in float64 and rounded once.

    A row's result then does not depend on how many rows are computed together (a float32 product
    does, through its kernel's blocking): a merge quantizes chunk by chunk exactly the
    values that training quantized shard by shard.

    Args:
        rows: [rows, in].
        B: [rows, r].
        A: [r, in].
    """
    result = torch.empty(rows.shape, dtype=torch.float32, device=rows.device)
    right = A.to(rows.device, torch.float64) * scaling
    for part in Span(0, rows.shape[0]).split_into_chunks(_num_chunk_rows(rows)):
        left = B[part.slice].to(rows.device, torch.float64)
        result[part.slice] = rows[part.slice].double() + left @ right
    return result


def compute_top_singular(
    rows: Tensor, rank: int, *, iterations: int, seed: int, reduce: Reduce
) -> LowRankFactors:
    """The part of the matrix along its ``rank`` leading right singular vectors, in float64.

    ``B A`` with ``A = sqrt(S) V^T`` and ``B = U sqrt(S)``. Where the matrix has a smaller rank, the
    spare rows of ``A`` are unit vectors and the spare columns of ``B`` are (nearly) zero.

    Args:
        rows: this rank's rows [rows, in] of the matrix, maybe none.
        rank: at most ``in``.
        iterations: power iterations; each is one sum over the ranks, and there is one more.
        seed: of the random start.
        reduce: sums over the ranks.
    """
    features = rows.shape[1]
    assert rank <= features, f"rank {rank} of {features} columns"
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(
        features, min(features, 2 * rank + 8), generator=generator, dtype=torch.float64
    )
    basis = torch.linalg.qr(start.to(rows.device)).Q
    for _ in range(iterations):
        basis = torch.linalg.qr(reduce(_multiply_by_gram(rows, basis))).Q
    small = basis.T @ reduce(_multiply_by_gram(rows, basis))
    squares, vectors = torch.linalg.eigh((small + small.T) / 2)
    right = (basis @ vectors[:, -rank:].flip(1)).T.contiguous()
    right *= right.gather(1, right.abs().argmax(1, keepdim=True)).sign()
    values = squares[-rank:].flip(0).clamp_min(0).sqrt()
    root = torch.where(values > _NO_SIGNAL * values[0], values, 1.0).sqrt()
    left = torch.empty(rows.shape[0], rank, dtype=torch.float64, device=rows.device)
    for part in Span(0, rows.shape[0]).split_into_chunks(_num_chunk_rows(rows)):
        left[part.slice] = rows[part.slice].double() @ right.T / root
    return LowRankFactors(right * root[:, None], left)


def _num_chunk_rows(rows: Tensor) -> int:
    """How many rows to take at a time, so that temporaries do not grow with the columns."""
    return max(1, _CHUNK_ELEMENTS // max(1, rows.shape[1]))


def _multiply_by_gram(rows: Tensor, basis: Tensor) -> Tensor:
    """``W^T (W V)`` [in, k] over this rank's rows."""
    total = torch.zeros_like(basis)
    for part in Span(0, rows.shape[0]).split_into_chunks(_num_chunk_rows(rows)):
        chunk = rows[part.slice].double()
        total += chunk.T @ (chunk @ basis)
    return total
