"""LoRA on the experts of a mixture: a low-rank change of each expert's own.

For one of a layer's two stacks (``model.experts``), ``E`` experts of ``W_e`` [out, in]::

    y = W_e x + s B_e A_e x         A_e [r, in], B_e [out, r]; s = alpha/r, rsLoRA: alpha/sqrt(r)

The factors of all experts are two parameters, as PEFT lays them out for ``list_target_parameters``
(``ParamWrapper``); an expert's rows of A are together, its columns of B are ``E`` apart::

    lora_A [E * r, in]     rows e r .. e r + r of expert e
    lora_B [out, r * E]    columns e, E + e, 2 E + e, ...

PEFT adds ``s B_e A_e`` to the dense weight of every expert, in each forward; here the product of
the factors is never formed, and experts without tokens cost nothing. As in PEFT there is no DoRA.
PEFT cannot train with dropout there; here a token's input of ``A`` has it, the same for all of its
experts.
"""

import math

import torch
from torch import Tensor, nn

from dist_peft.adapters.low_rank.module import LowRankModule, LowRankSpec
from dist_peft.model.expert_exchange import FactorFetch
from dist_peft.model.experts import ExpertStack
from dist_peft.model.sample_dropout import SampleDropout
from dist_peft.quant.grouped_low_rank import apply_grouped_low_rank
from dist_peft.quant.grouped_matmul import RowGroups

__all__ = ["LoraExperts"]


class LoraExperts(LowRankModule):
    """An ``ExpertStack`` with factors ``A`` and ``B`` for each expert.

    Args:
        base: the wrapped stack.
        path: its name in the model.
        spec: settings of the module; ``r`` is the rank of each expert.
        dropout: of the inputs of ``A``.
        device: where the (unfilled) parameters are made.
    """

    starts_at_zero = "lora_B"
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    factor_exchange: FactorFetch | None = None

    def __init__(
        self,
        base: ExpertStack,
        path: str,
        spec: LowRankSpec,
        dropout: SampleDropout,
        device: torch.device | str = "meta",
    ) -> None:
        super().__init__(path, spec)
        self.base, self.dropout = base, dropout
        width = base.experts * spec.r
        self._add_meta_parameter("lora_A", (width, base.in_features), device, train=True)
        self._add_meta_parameter("lora_B", (base.out_features, width), device, train=True)

    def forward(self, x: Tensor, groups: RowGroups) -> Tensor:
        """Return the products of all experts with their tokens, the adapter added."""
        y: Tensor = self.base(x, groups)
        if not self.is_enabled:
            return y
        if self.dropout.p and self.training:
            if groups.keys is not None:
                x = self.dropout.drop_keyed_rows(x, groups.keys)
            else:
                assert groups.tokens is not None, f"{self.path}: which tokens are dropped in?"
                x = self.dropout.drop_rows(x, groups.tokens, groups.num_tokens)
        return (y + self.multiply_factors(x, groups)).to(y.dtype)

    def multiply_factors(self, x: Tensor, groups: RowGroups) -> Tensor:
        """Return ``s B_e A_e x`` of rows sorted by expert, ``[n, out]``, with the factors of the
        experts that this rank computes."""
        A: Tensor = self.lora_A
        B: Tensor = self.lora_B
        if self.factor_exchange is not None:
            A, B = self.factor_exchange.fetch_own(self.lora_A, self.lora_B)
            groups = groups.select(self.base.own_experts)
        return apply_grouped_low_rank(x, A, B, groups, self.spec.scaling, self.spec.arithmetic)

    def locate_experts(self) -> dict[str, tuple[int, Tensor]]:
        """Map the factors to the dimension and positions of each expert's part, ``[E, r]``."""
        experts, r = self.base.experts, self.spec.r
        places = torch.arange(experts * r)
        return {"lora_A": (0, places.view(experts, r)), "lora_B": (1, places.view(r, experts).T)}

    def _draw_initial_values(self, name: str) -> Tensor:
        """``A`` as PEFT starts it: Kaiming uniform with a = sqrt(5), in [-1, 1] / sqrt(in)."""
        value = torch.empty(self.shapes[name])
        return nn.init.kaiming_uniform_(value, a=math.sqrt(5), generator=self._make_generator(name))
