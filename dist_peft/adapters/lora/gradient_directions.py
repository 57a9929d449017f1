"""LoRA-GA: the first steps of LoRA follow the gradient of the whole weight.

LoRA-GA (Wang, Yu, Li 2024, "LoRA-GA: Low-Rank Adaptation with Gradient Approximation"). With the
gradient ``G`` [out, in] of the loss on some batches of training data, ``G = U S V^T``::

    A0 = c V[:, 1 .. r]^T        B0 = c U[:, r+1 .. 2r]        c = out^(1/4) / sqrt(gamma)
    y  = W x + s (B A - B0 A0) x

so that the first update of ``B A`` is the best approximation of rank ``2r`` of a step of full
fine-tuning (theorem 3.1), at a scale that does not depend on the sizes (theorem 3.2, "stable").

The paper subtracts ``s B0 A0`` from the weight. Here the pair stays next to the weight, frozen: the
same function without the rounding of the changed weight, which in a base of 4 bits is larger than
the change by training, and every base is left as it is (docs/decisions/0021).

PEFT's ``lora_ga`` differs: it multiplies ``B0`` by the singular values and leaves ``A0`` unscaled.
"""

from torch import Tensor

from dist_peft.adapters.low_rank.row_sharded import LowRankFactors, compute_top_singular

__all__ = ["compute_gradient_factors"]


def compute_gradient_factors(
    gradient: Tensor, rank: int, gamma: float, *, iterations: int, seed: int
) -> LowRankFactors:
    """Return ``A0`` and ``B0``, float32.

    Args:
        gradient: float64 ``[out, in]``, whole, up to a positive factor.
        rank: ``r``, at most half of the smaller side.
        gamma: of ``c``.
        iterations: power iterations of the SVD.
        seed: of its random start.

    Raises:
        ValueError: the gradient is zero.
    """
    if not bool(gradient.any()):
        raise ValueError("no gradient reaches it")
    top = compute_top_singular(
        gradient, 2 * rank, iterations=iterations, seed=seed, reduce=_sum_of_one
    )
    # both factors have the root of each singular value; a spare row of A has length 1
    lengths = top.A.norm(dim=1)
    right, left = top.A / lengths[:, None], top.B / lengths
    scale = gradient.shape[0] ** 0.25 / gamma**0.5
    return LowRankFactors(scale * right[:rank], scale * left[:, rank:]).to_float32()


def _sum_of_one(tensor: Tensor) -> Tensor:
    return tensor
