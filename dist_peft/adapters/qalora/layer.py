"""QA-LoRA's layer: a low-rank change that is constant within the base's quantization groups.

QA-LoRA (Xu et al. 2024, section 3.3 and algorithm 1)::

    y = W x + b + s B A drop(P x)       A [r, L], B [out, r]; s = alpha/r

``P`` sums each group of ``pool_size`` neighbouring inputs, ``L = in / pool_size``. The same as LoRA
with an ``A`` whose columns repeat within a group::

    in:     x0 x1 x2 x3 | x4 x5 x6 x7 |          pool_size 4
    P x:    x0+x1+x2+x3 | x4+x5+x6+x7 |
    s B A:  d0 d0 d0 d0 | d1 d1 d1 d1 |          [out, in], one number a row and group

An affine base has one zero a row and group, ``W = (q - zero) scale``, if a pool group is a union of
whole quantization groups. Then the change fits into the zeros and codes stay
(``adapters.low_rank.zero_points``)::

    (q - zero) scale + d  =  (q - (zero - d / scale)) scale

Sums grow with the group: at equal factors a group of 32 changes the output as 32 LoRA inputs do
that agree. ``A`` therefore starts as LoRA's would with the same ``in``, uniform in
``[-1, 1] / sqrt(in)`` (the paper does not say how), ``B`` at zero.

Differences: the authors' repository and PEFT scale the sum (``adapters.low_rank.pooling``).
"""

import torch
from torch import Tensor, nn

from dist_peft.adapters.low_rank.linear_layer import LowRankLinear
from dist_peft.adapters.low_rank.module import LowRankSpec
from dist_peft.model.frozen_linear import FrozenLinear
from dist_peft.model.sample_dropout import SampleDropout

__all__ = ["QaLoraLinear", "pool_groups"]


def pool_groups(x: Tensor, size: int) -> Tensor:
    """Sums of ``size`` neighbours: ``[..., in]`` -> ``[..., in / size]`` in the type of ``x``."""
    return x.unflatten(-1, (-1, size)).sum(-1)


class QaLoraLinear(LowRankLinear):
    """A ``FrozenLinear`` with factors on the sums of groups of inputs.

    Args:
        base: the wrapped linear.
        path: its name in the model.
        spec: settings of the module.
        pool_size: inputs summed into one; divides ``in_features``.
        dropout: on the pooled input.
        device: where the (unfilled) parameters are made.

    Attributes:
        lora_A, lora_B: ``[r, in / pool_size]``, ``[out, r]``.
    """

    starts_at_zero = "lora_B"
    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def __init__(
        self,
        base: FrozenLinear,
        path: str,
        spec: LowRankSpec,
        pool_size: int,
        dropout: SampleDropout,
        device: torch.device | str = "meta",
    ) -> None:
        super().__init__(base, path, spec, dropout)
        self.pool_size = pool_size
        self._add_meta_parameter(
            "lora_A", (spec.r, base.in_features // pool_size), device, train=True
        )
        self._add_meta_parameter("lora_B", (base.out_features, spec.r), device, train=True)

    def _compute_update(self, x: Tensor) -> Tensor:
        pooled = self.dropout(pool_groups(x.to(self.spec.arithmetic), self.pool_size))
        return self._multiply_factors(pooled, self.lora_A, self.lora_B)

    def _draw_initial_values(self, name: str) -> Tensor:
        bound = self.base.in_features**-0.5
        value = torch.empty(self.shapes[name])
        return value.uniform_(-bound, bound, generator=self._make_generator(name))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, pool_size={self.pool_size}"
