"""LoRA on the experts of a mixture, through the quantizer (see ``through_quantizer``).

For each expert of a stack::

    Q_e = quantize(W_e + s B_e A_e)     forward: y = x Q_e^T

    dx = dy Q_e        dB_e = s dy^T (x A_e^T)        dA_e = s (dy B_e)^T x

The gradients of the factors are those of LoRA's own product, which is computed next to that of
``Q_e`` and taken from it again, so that nothing of it is in the value: ``y + (d - d)``. Experts
without tokens cost nothing. After a step each rank encodes its own rows, which may begin and end
within an expert; the factors of all experts are gathered for it, ``4 r (in + out)`` bytes each.
"""

import torch
from torch import Tensor

from dist_peft.adapters.lora.expert_layer import LoraExperts
from dist_peft.adapters.lora.through_rows import ThroughRows
from dist_peft.adapters.low_rank.blocked_product import add_expert_products
from dist_peft.adapters.step_hooks import ParameterAccess
from dist_peft.core.span import Span
from dist_peft.model.experts import ExpertStack
from dist_peft.quant.grouped_matmul import RowGroups

__all__ = ["ThroughExperts"]


class ThroughExperts(ThroughRows, LoraExperts):
    """An ``ExpertStack`` that has the packed rows of ``W_e + s B_e A_e``; see ``ThroughRows``."""

    base: ExpertStack

    def forward(self, x: Tensor, groups: RowGroups) -> Tensor:
        """Return the products of all experts with their tokens."""
        if self.start == "lora":
            return super().forward(x, groups)
        y: Tensor = self.base(x, groups)
        change = self.multiply_factors(x.detach(), groups)
        return y + (change - change.detach()).to(y.dtype)

    def encode_from_factors(self, name: str, access: ParameterAccess, *, count: bool) -> Tensor:
        """Gather both factors of all experts; see ``ThroughRows``."""
        A, B = (access.gather_parameter(f"{name}.{own}") for own in ("lora_A", "lora_B"))
        return self.encode_own_rows(A, B, access.device, count=count)

    @torch.no_grad()
    def encode_own_rows(
        self, A: Tensor, B: Tensor, device: torch.device, *, count: bool = False
    ) -> Tensor:
        """Return this rank's rows of the stack, ``uint8 [rows, row_bytes]``.

        Args:
            A, B: whole, ``[E * r, in]`` and ``[out, r * E]``, float32.
            device: where rows are encoded.
            count: of a packed base, count the codes that changed.

        Raises:
            UserError: the codec cannot hold the values.
        """
        experts = self.base.experts
        left = B.unflatten(1, (-1, experts)).permute(2, 0, 1).flatten(0, 1)

        def add(rows: Tensor, span: Span) -> Tensor:
            return add_expert_products(rows, left, A, self.spec.scaling, experts, span)

        return self.encode_added_rows(add, device, count=count)
