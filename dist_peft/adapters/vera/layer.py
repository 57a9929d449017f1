"""VeRA's layer: frozen random projections, and two trained vectors that scale their outputs.

VeRA (Kopiczko, Blankevoort, Asano 2024, equation 2)::

    y = W x + c + b * (B (d * (A drop(x))))      A [r, in], B [out, r] frozen; d [r], b [out]

``d`` starts at ``d_initial`` (0.1, section 3.3), ``b`` at zero, so that training starts from the
base. ``A`` and ``B`` are parts of one pair for the whole model (``vera.projections``).
"""

import torch
from torch import Tensor, nn

from dist_peft.adapters.low_rank.linear_layer import LowRankLinear
from dist_peft.adapters.low_rank.module import LowRankSpec
from dist_peft.adapters.vera.projections import SharedProjections
from dist_peft.model.frozen_linear import FrozenLinear
from dist_peft.model.sample_dropout import SampleDropout
from dist_peft.quant.trainable_products import apply_scaled_projections

__all__ = ["VeraLinear"]


class VeraLinear(LowRankLinear):
    """A ``FrozenLinear`` with vectors on shared projections.

    Args:
        base: the wrapped linear.
        path: its name in the model.
        spec: settings; ``scaling`` is 1, since VeRA has none.
        dropout: on the adapter's input.
        projections: of all layers.
        d_initial: initial value of ``d``.

    Attributes:
        vera_lambda_d, vera_lambda_b: ``[r]``, ``[out]``.
    """

    starts_at_zero = "vera_lambda_b"
    vera_lambda_d: nn.Parameter
    vera_lambda_b: nn.Parameter

    def __init__(
        self,
        base: FrozenLinear,
        path: str,
        spec: LowRankSpec,
        dropout: SampleDropout,
        projections: SharedProjections,
        d_initial: float,
    ) -> None:
        super().__init__(base, path, spec, dropout)
        self.projections, self.d_initial = projections, d_initial
        self._add_meta_parameter("vera_lambda_d", (spec.r,), "meta", train=True)
        self._add_meta_parameter("vera_lambda_b", (base.out_features,), "meta", train=True)

    def _compute_update(self, x: Tensor) -> Tensor:
        A = self.projections.A[:, : self.base.in_features]
        B = self.projections.B[: self.base.out_features]
        return apply_scaled_projections(
            self.dropout(x), A, self.vera_lambda_d, B, self.vera_lambda_b, self.spec.arithmetic
        )

    def _draw_initial_values(self, name: str) -> Tensor:
        return torch.full((self.spec.r,), self.d_initial)
