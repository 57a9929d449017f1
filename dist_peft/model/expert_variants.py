"""Experts that are called in another way than with the routes of their tokens.

``FrozenExperts`` takes tokens, the ``k`` experts of each and their factors. Some families differ::

    Llama 4         each expert gets every token, multiplied by its score; 0: not chosen
    LongCat-Flash   experts from number E on have no weights: y = w_e x (Jin et al. 2024, MoE++)
    Inkling         shared experts, of which each gets every token: y = sum of g_e D_e (...)
    JetMoE          a product of its own, for mixtures of attention too: rows come sorted
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dist_peft.model.expert_kinds import ExpertForm
from dist_peft.model.experts import FrozenExperts
from dist_peft.quant.grouped_matmul import RowGroups, count_sorted

__all__ = [
    "EXPERT_CLASSES",
    "IdentityExperts",
    "OneProductExperts",
    "ScaledInputExperts",
    "SharedExperts",
    "make_stand_in",
]


class ScaledInputExperts(FrozenExperts):
    """Llama 4's experts: each gets every token, multiplied by its score, 0 where it was not chosen.

    An input of zeros has an output of zeros, and gives no gradient to input and weights, as there
    are no biases and the gate is a product. So rows of zeros are left out, exactly.
    """

    form = "scaled_inputs"

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        """``[E * n, H]``, the tokens of expert 0, then those of expert 1, to the same shape."""
        tokens = len(hidden_states) // self.num_experts
        is_chosen = hidden_states.detach().any(1)
        counts = is_chosen.view(self.num_experts, tokens).sum(1)
        groups, routes = self._group_rows(counts, tokens)  # traced: one expert for each token
        # the indices of the chosen rows, whose number is known
        order = is_chosen.to(torch.uint8).argsort(descending=True, stable=True)
        kept = order[: groups.num_rows]
        chosen = kept // tokens
        groups = groups.with_tokens(kept % tokens, tokens)
        y = self._multiply_at_owners(hidden_states[kept], groups, routes, chosen)
        return y.new_zeros(hidden_states.shape).index_copy(0, kept, y)

    def count_rows(self, *inputs: Tensor) -> Tensor:
        return inputs[0].detach().any(1).view(self.num_experts, -1).sum(1)

    def count_choices(self, *inputs: Tensor) -> tuple[int, int]:
        return len(inputs[0]) // self.num_experts, 1


class IdentityExperts(FrozenExperts):
    """LongCat-Flash's experts: those from ``num_experts`` on return their input."""

    form = "with_identities"

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Compute the weighted sum of the chosen experts' outputs, shapes as of ``FrozenExperts``;
        ``top_k_index`` from ``num_experts`` on are tokens themselves."""
        chosen = top_k_index.flatten()
        by_expert, order = chosen.sort(stable=True)
        groups, routes = self._group_rows(count_sorted(by_expert, self.num_experts), len(order))
        kept = order[: groups.num_rows]  # rows without weights come last
        tokens = kept // top_k_index.shape[1]
        groups = groups.with_tokens(tokens, len(hidden_states))
        x = hidden_states[tokens]
        y = self._multiply_at_owners(x, groups, routes, by_expert[: groups.num_rows])
        y = y.new_zeros(len(order), y.shape[-1]).index_copy(0, kept, y)
        y = y.view(*top_k_index.shape, -1) * top_k_weights.unsqueeze(-1)
        is_identity = (top_k_index >= self.num_experts).to(top_k_weights.dtype)
        own = (top_k_weights * is_identity).sum(-1, keepdim=True)
        return (y.sum(1) + own * hidden_states).to(hidden_states.dtype)


class SharedExperts(FrozenExperts):
    """Inkling's shared experts: each gets every token, and a factor of each token."""

    form = "shared"

    is_routed = False

    def forward(self, hidden_states: Tensor, gammas: Tensor) -> Tensor:  # type: ignore[override]
        """Add up the outputs, in float32.

        Args:
            hidden_states: ``[..., H]``, ``n`` tokens.
            gammas: ``[n, E]``, factors of the outputs.
        """
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        tokens = torch.arange(len(x), device=x.device).repeat(self.num_experts)
        groups = RowGroups.from_counts([len(x)] * self.num_experts).with_tokens(tokens, len(x))
        chosen = torch.arange(self.num_experts, device=x.device).repeat_interleave(len(x))
        y = self._multiply(x[tokens], groups, chosen).view(self.num_experts, *x.shape)
        factors = gammas.reshape(-1, self.num_experts, 1).transpose(0, 1)
        return (y.float() * factors).sum(0).to(x.dtype).view(hidden_states.shape)


class OneProductExperts(FrozenExperts):
    """JetMoE's experts, of attention and of MLPs: one product, whose caller has sorted the rows."""

    form = "one_product"

    def forward(  # type: ignore[override]
        self, inputs: Tensor, expert_size: Sequence[int]
    ) -> Tensor:
        """Multiply ``inputs`` [n, in], sorted by expert, to [n, out].

        Args:
            expert_size: rows of each expert.
        """
        device = "cpu" if self.exchange is None else inputs.device  # where they are read
        counts = torch.tensor(expert_size, device=device)
        groups, routes = self._group_rows(counts, len(inputs))
        no_biases = counts[:0]  # which would be added by expert
        return self._multiply_at_owners(inputs, groups, routes, no_biases)

    def count_rows(  # type: ignore[override]
        self, inputs: Tensor, expert_size: Sequence[int]
    ) -> Tensor:
        return torch.tensor(expert_size, device=inputs.device)

    def count_choices(  # type: ignore[override]
        self, inputs: Tensor, expert_size: Sequence[int]
    ) -> tuple[int, int]:
        return len(inputs), 1

    def _multiply(self, x: Tensor, groups: RowGroups, chosen: Tensor) -> Tensor:
        (name,) = self.stack_names
        return self._multiply_stack(name, x, groups, chosen)


def make_stand_in(form: ExpertForm, out_features: int) -> Callable[..., Tensor]:
    """Return a cheap function of the inputs of experts, token by token and in the shape of their
    outputs ``[..., out]``, for trials of a model without weights."""

    def stand_in(x: Tensor, *routing: Any, **named: Any) -> Tensor:
        given = [*routing, *named.values()]
        if form == "one_product":
            return torch.sin(x.sum(-1, keepdim=True) / x.shape[-1]).expand(-1, out_features)
        if form == "scaled_inputs":
            return torch.sin(x)
        factors = given[-1].sum(-1).view(*x.shape[:-1], 1)
        return torch.sin(x) * factors.to(x.dtype)

    return stand_in


EXPERT_CLASSES: dict[ExpertForm, type[FrozenExperts]] = {
    "routed": FrozenExperts,
    "scaled_inputs": ScaledInputExperts,
    "with_identities": IdentityExperts,
    "shared": SharedExperts,
    "one_product": OneProductExperts,
}
"""Replacements of ``transformers``' modules, by the form of ``ExpertKind``."""
