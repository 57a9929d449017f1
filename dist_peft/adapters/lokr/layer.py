"""LoKr's layer: a change that is a Kronecker product of two small matrices.

KronA (Edalati et al. 2022, equation 4), with a low-rank second matrix as in LyCORIS (Yeh et al.
2024, section 3.2)::

    D = s W1 (x) W2         W1 [l, m], W2 [k, n];  out = l k, in = m n;  s = alpha / r
    D[a k + b, c n + d] = s W1[a, c] W2[b, d]

::

    W2 = W2a W2b            W2a [k, r], W2b [r, n]      where r < max(k, n) / 2
    W1 = W1a W1b            W1a [l, r], W1b [r, m]      decompose_both, where r < max(l, m) / 2

The forward takes ``x`` for a matrix ``X`` [m, n] and computes ``W1 X W2^T``, [l, k], whose rows
follow each other in ``y``: ``D``, which PEFT forms, is not needed.

``l <= k`` and ``m <= n`` are PEFT's (``factorize``). Initialization as in PEFT: Kaiming uniform
with a = sqrt(5), ``W1`` (or ``W1a``) zero.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dist_peft.adapters.low_rank.linear_layer import LowRankLinear
from dist_peft.adapters.low_rank.module import LowRankSpec
from dist_peft.model.frozen_linear import FrozenLinear
from dist_peft.model.sample_dropout import SampleDropout
from dist_peft.quant.trainable_products import apply_linear, apply_low_rank

__all__ = ["LokrLinear", "LokrSpec", "factorize"]


@dataclass(frozen=True)
class LokrSpec(LowRankSpec):
    """Settings of one adapted module, in addition to ``LowRankSpec``'s.

    Attributes:
        factor: wanted side of ``W1``; None: nearest to the square root.
        both: a low-rank ``W1`` too.
    """

    factor: int | None = None
    both: bool = False


def factorize(size: int, factor: int | None) -> tuple[int, int]:
    """Return two numbers whose product is ``size``, as PEFT's ``factorization`` does.

    Args:
        factor: the first one, if it divides ``size``; else the result is the smaller number first,
            the largest divisor that is at most ``factor`` and the square root. None: the latter.
    """
    if factor is not None and size % factor == 0:
        return factor, size // factor
    most = min(math.isqrt(size), factor or size)
    first = max(divisor for divisor in range(1, most + 1) if size % divisor == 0)
    return first, size // first


class LokrLinear(LowRankLinear):
    """A ``FrozenLinear`` with LoKr's matrices.

    Attributes:
        lokr_w1: ``[l, m]``; or ``lokr_w1_a`` [l, r] and ``lokr_w1_b`` [r, m].
        lokr_w2: ``[k, n]``; or ``lokr_w2_a`` [k, r] and ``lokr_w2_b`` [r, n].
        sides: ``l``, ``k``, ``m``, ``n``.
    """

    spec: LokrSpec
    lokr_w1: nn.Parameter
    lokr_w1_a: nn.Parameter
    lokr_w1_b: nn.Parameter
    lokr_w2: nn.Parameter
    lokr_w2_a: nn.Parameter
    lokr_w2_b: nn.Parameter

    def __init__(
        self, base: FrozenLinear, path: str, spec: LokrSpec, dropout: SampleDropout
    ) -> None:
        super().__init__(base, path, spec, dropout)
        l, k = factorize(base.out_features, spec.factor)  # noqa: E741
        m, n = factorize(base.in_features, spec.factor)
        self.sides = (l, k, m, n)
        self._add_matrix("lokr_w1", l, m, low_rank=spec.both and spec.r < max(l, m) / 2)
        self._add_matrix("lokr_w2", k, n, low_rank=spec.r < max(k, n) / 2)
        self.starts_at_zero = "lokr_w1" if "lokr_w1" in self.shapes else "lokr_w1_a"

    def _add_matrix(self, name: str, rows: int, columns: int, *, low_rank: bool) -> None:
        r = self.spec.r
        parts = {f"{name}_a": (rows, r), f"{name}_b": (r, columns)}
        for own, shape in parts.items() if low_rank else [(name, (rows, columns))]:
            self._add_meta_parameter(own, shape, "meta", train=True)

    def _compute_update(self, x: Tensor) -> Tensor:
        _, _, m, n = self.sides
        x = self.dropout(x).to(self.spec.arithmetic).unflatten(-1, (m, n))
        inner = self._apply_matrix(x, "lokr_w2") * self.spec.scaling  # [..., m, k]
        return self._apply_matrix(inner.mT, "lokr_w1").mT.flatten(-2)  # [..., l k]

    def _apply_matrix(self, x: Tensor, name: str) -> Tensor:
        if name in self.shapes:
            return apply_linear(x, getattr(self, name))
        a, b = getattr(self, f"{name}_a"), getattr(self, f"{name}_b")
        return apply_low_rank(x, b, a, 1.0, self.spec.arithmetic)

    def _draw_initial_values(self, name: str) -> Tensor:
        value = torch.empty(self.shapes[name])
        return nn.init.kaiming_uniform_(value, a=math.sqrt(5), generator=self._make_generator(name))
