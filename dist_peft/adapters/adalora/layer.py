"""AdaLoRA's layer: a change in the form of a singular value decomposition.

AdaLoRA (Zhang et al. 2023, equations 3 and 4)::

    y = W x + b + s B (E * (A drop(x)))        A [r, in], E [r], B [out, r]; s = alpha / (r + 1e-5)

with PEFT's names: ``A`` is the paper's ``Q``, ``B`` its ``P``, ``E`` its ``Lambda``; ``r`` is the
initial rank, also after triplets were dropped. ``A`` and ``B`` start normal with deviation 0.02,
``E`` at zero. A penalty keeps the rows of ``A`` and the columns of ``B`` nearly orthonormal::

    weight / (2 L) * sum over L modules of  ||A A^T - I||_F + ||B^T B - I||_F

Its gradient is added where a module's ``A`` and ``B`` are whole, in the module's own backward; each
backward of an optimizer step adds its share. The reported loss is the tokens' alone.
"""

from typing import Any

import torch
from torch import Tensor, nn

from dist_peft.adapters.low_rank.linear_layer import LowRankLinear
from dist_peft.adapters.low_rank.module import LowRankSpec
from dist_peft.model.frozen_linear import FrozenLinear
from dist_peft.model.sample_dropout import SampleDropout

__all__ = ["RANK_EPSILON", "AdaLoraLinear", "OrthogonalityPenalty"]

RANK_EPSILON = 1e-5
"""Added to the rank before the division by it, as in PEFT."""

_DEVIATION = 0.02


class OrthogonalityPenalty:
    """How strongly the penalty acts in a backward pass; shared by the layers of a model.

    Engines may scale a loss before its backward pass, so the penalty looks at the gradient that
    arrives at the loss, which is the first thing that backward computes.

    Attributes:
        weight: of one matrix's norm.
        strength: ``weight`` times the scale of the present backward pass.
    """

    def __init__(self) -> None:
        self.weight = 0.0
        self.strength = 0.0

    def attach_to_loss(self, loss: Tensor, parts: float) -> None:
        """Act in the backward pass of ``loss``, one of ``parts`` of an optimizer step."""

        def record_loss_scale(grad: Tensor) -> None:
            self.strength = self.weight / parts * float(grad)

        self.strength = 0.0
        if self.weight:
            loss.register_hook(record_loss_scale)


class _Penalized(torch.autograd.Function):
    """``change`` itself; its backward adds the penalty's gradient to ``A`` and ``B``.

    They are kept as objects, not saved: engines free and refill their storage between forward and
    backward (as in ``quant.frozen_matmul``). A forward that is recomputed by activation
    checkpointing has no backward of its own, so the penalty is not counted twice.
    """

    @staticmethod
    def forward(
        ctx: Any, change: Tensor, A: Tensor, B: Tensor, penalty: OrthogonalityPenalty
    ) -> Tensor:
        ctx.A, ctx.B, ctx.penalty = A, B, penalty
        return change.view_as(change)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        strength = ctx.penalty.strength
        if not strength:
            return grads[0], None, None, None
        gradients = [_norm_gradient(rows.detach()) for rows in (ctx.A, ctx.B.T)]
        return grads[0], gradients[0] * strength, gradients[1].T * strength, None


def _norm_gradient(rows: Tensor) -> Tensor:
    """Gradient of ``||R R^T - I||_F`` with respect to ``R`` [r, n]."""
    rest = rows @ rows.T - torch.eye(rows.shape[0], device=rows.device)
    norm = rest.norm().clamp_min(torch.finfo(torch.float32).tiny)
    return (rest / norm * 2) @ rows


class AdaLoraLinear(LowRankLinear):
    """A ``FrozenLinear`` with a change of AdaLoRA's form.

    Args:
        base: the wrapped linear.
        path: its name in the model.
        spec: settings; ``r`` is the initial rank.
        dropout: on the adapter's input.
        penalty: of all layers.

    Attributes:
        lora_A, lora_E, lora_B: ``[r, in]``, ``[r]``, ``[out, r]``.
    """

    starts_at_zero = "lora_E"
    lora_A: nn.Parameter
    lora_E: nn.Parameter
    lora_B: nn.Parameter

    def __init__(
        self,
        base: FrozenLinear,
        path: str,
        spec: LowRankSpec,
        dropout: SampleDropout,
        penalty: OrthogonalityPenalty,
    ) -> None:
        super().__init__(base, path, spec, dropout)
        self.penalty = penalty
        self._add_meta_parameter("lora_A", (spec.r, base.in_features), "meta", train=True)
        self._add_meta_parameter("lora_E", (spec.r,), "meta", train=True)
        self._add_meta_parameter("lora_B", (base.out_features, spec.r), "meta", train=True)

    def _compute_update(self, x: Tensor) -> Tensor:
        A, B = self.lora_A, self.lora_B
        change = self._multiply_factors(self.dropout(x), A * self.lora_E[:, None], B)
        penalized: Tensor = _Penalized.apply(change, A, B, self.penalty)
        return penalized

    def _draw_initial_values(self, name: str) -> Tensor:
        value = torch.empty(self.shapes[name])
        return value.normal_(std=_DEVIATION, generator=self._make_generator(name))
