"""PiSSA and LoftQ: adapters that start from the base instead of from zero.

PiSSA (Meng, Wang, Zhang 2024, section 3)::

    s B0 A0 = the r leading singular components of W        encoded:  W - s B0 A0

The adapter starts as the principal part of the weight, the frozen base keeps the rest.

LoftQ (Li et al. 2023, algorithm 1), ``T`` alternations from ``B = A = 0``::

    Q_t     = encode(W - s B_{t-1} A_{t-1})
    s B A_t = the r leading singular components of W - decode(Q_t)

The base keeps ``Q_T`` and the adapter starts as ``B_T A_T``, the best low-rank fit of the
quantization error. The order matters: quantizing once more after the last fit would replace the
error that ``B_T A_T`` fits by a new one. So two products are involved: the adapter's start (which a
merge into the original weight must take away again) and the one removed before encoding (which is
needed to reproduce ``Q_T``). PiSSA has one for both; LoftQ with one alternation removes nothing.

PEFT's ``loftq_init`` differs: it leaves out ``s``, so that its start fits only where ``s = 1``.
"""

from dataclasses import dataclass

from torch import Tensor

from dist_peft.adapters.low_rank.row_sharded import (
    LowRankFactors,
    add_factor_product,
    compute_top_singular,
)
from dist_peft.model.adapter_module import Reduce
from dist_peft.quant.codec import Codec

__all__ = ["RESIDUAL_INITS", "InitialFactors", "init_loftq_factors", "init_pissa_factors"]

RESIDUAL_INITS = ("pissa", "loftq")
"""Values of ``adapter.init`` that train on a changed base."""

_LOFTQ_POWER_ITERATIONS = 4


@dataclass(frozen=True)
class InitialFactors:
    """Where an adapter starts, in float32.

    Attributes:
        factors: initial values of the adapter.
        removed: the part subtracted from the weight, times ``s``, before it is quantized.
    """

    factors: LowRankFactors
    removed: LowRankFactors | None


def init_pissa_factors(
    rows: Tensor, rank: int, scaling: float, *, iterations: int, seed: int, reduce: Reduce
) -> InitialFactors:
    """Return PiSSA's factors; ``rows`` [rows, in] are this rank's rows, ``scaling`` is ``s``."""
    top = compute_top_singular(rows, rank, iterations=iterations, seed=seed, reduce=reduce)
    start = top.scale_factors(1 / scaling).to_float32()
    return InitialFactors(start, start)


def init_loftq_factors(
    rows: Tensor,
    rank: int,
    scaling: float,
    codec: Codec,
    *,
    iterations: int,
    seed: int,
    reduce: Reduce,
) -> InitialFactors:
    """Return LoftQ's factors; ``iterations`` is ``T``, at least 1."""
    removed: LowRankFactors | None = None
    fit: LowRankFactors | None = None
    for _ in range(iterations):
        removed = fit
        shifted = rows
        if removed is not None:
            shifted = add_factor_product(rows, removed.B, removed.A, -scaling)
        decoded = codec.dequantize_rows(
            codec.quantize_to_packed(shifted), rows.shape[1], rows.dtype
        )
        top = compute_top_singular(
            rows - decoded, rank, iterations=_LOFTQ_POWER_ITERATIONS, seed=seed, reduce=reduce
        )
        fit = top.scale_factors(1 / scaling).to_float32()
    assert fit is not None
    return InitialFactors(fit, removed)
