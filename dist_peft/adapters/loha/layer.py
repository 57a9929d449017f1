"""LoHa's layer: a change that is the elementwise (Hadamard) product of two low-rank products.

FedPara (Hyeon-Woo, Ye-Bin, Oh 2022, proposition 1), for language models as in LyCORIS::

    D = s (W1a W1b) * (W2a W2b)     W1a, W2a [out, r]; W1b, W2b [r, in]; s = alpha / r

``D`` has a rank of up to ``r^2``. It is itself a product of factors of that size, of which each
row and column is a product of two of the four matrices' (face-splitting product)::

    D = s B A        B[o, i r + j] = W1a[o, i] W2a[o, j]        A[i r + j, c] = W1b[i, c] W2b[j, c]

which the forward multiplies with, without ``D``, where that is less work; PEFT always forms ``D``.

Initialization as in PEFT: Kaiming uniform with a = sqrt(5), ``W2b`` zero.
"""

import math

import torch
from torch import Tensor, nn

from dist_peft.adapters.low_rank.linear_layer import LowRankLinear
from dist_peft.adapters.low_rank.module import LowRankSpec
from dist_peft.model.frozen_linear import FrozenLinear
from dist_peft.model.sample_dropout import SampleDropout
from dist_peft.quant.trainable_products import apply_linear

__all__ = ["LohaLinear"]


class LohaLinear(LowRankLinear):
    """A ``FrozenLinear`` with LoHa's four matrices.

    Attributes:
        hada_w1_a, hada_w2_a: ``[out, r]``.
        hada_w1_b, hada_w2_b: ``[r, in]``.
    """

    starts_at_zero = "hada_w2_b"
    hada_w1_a: nn.Parameter
    hada_w1_b: nn.Parameter
    hada_w2_a: nn.Parameter
    hada_w2_b: nn.Parameter

    def __init__(
        self, base: FrozenLinear, path: str, spec: LowRankSpec, dropout: SampleDropout
    ) -> None:
        super().__init__(base, path, spec, dropout)
        for number in (1, 2):
            for name, shape in (
                ("a", (base.out_features, spec.r)),
                ("b", (spec.r, base.in_features)),
            ):
                self._add_meta_parameter(f"hada_w{number}_{name}", shape, "meta", train=True)
        out, inputs = base.out_features, base.in_features
        self.multiplies_factors = spec.r**2 * (out + inputs) < out * inputs
        """Whether the forward uses the factors of size ``r^2`` and not ``D``."""

    def _compute_update(self, x: Tensor) -> Tensor:
        x = self.dropout(x)
        if self.multiplies_factors:
            B = (self.hada_w1_a[:, :, None] * self.hada_w2_a[:, None]).flatten(1)
            A = (self.hada_w1_b[:, None] * self.hada_w2_b[None]).flatten(0, 1)
            return self._multiply_factors(x, A, B)
        first, second = self.hada_w1_a @ self.hada_w1_b, self.hada_w2_a @ self.hada_w2_b
        return apply_linear(x.to(self.spec.arithmetic), first * second * self.spec.scaling)

    def _draw_initial_values(self, name: str) -> Tensor:
        value = torch.empty(self.shapes[name])
        return nn.init.kaiming_uniform_(value, a=math.sqrt(5), generator=self._make_generator(name))
