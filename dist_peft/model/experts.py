"""Mixture-of-experts layers: the experts of a block, packed, frozen and sharded like any linear.

A router chooses ``k`` of ``E`` experts for each token and weights their outputs (Shazeer et al.
2017; Mixtral, Qwen-MoE, OLMoE)::

    y_t = sum over the k chosen e of  w_te  D_e (act(G_e x_t) * U_e x_t)

``transformers`` keeps ``[G_e; U_e]`` and ``D_e`` of all experts in two 3-d parameters. Here each is
the stack of its experts' rows, one packed matrix, so that engines, codecs and files treat it as any
other weight::

    gate_up_proj.packed   uint8 [E * 2I, row_bytes(H)]    | G_0 | U_0 | G_1 | U_1 | ...
    down_proj.packed      uint8 [E * H,  row_bytes(I)]    | D_0 | D_1 | ...

A rank's rows of a stack can begin and end within an expert. Whole stacks are gathered with their
block, whichever experts the tokens chose, or the experts that tokens of any rank were routed to
(``engine.routed_gather``), so that all ranks call the same collectives; or a rank's rows are whole
experts, which stay, and tokens come to them (``engine.token_exchange``). *Dequantized* are only
those that got tokens, a few at a time (``quant.grouped_matmul``).

The files have a tensor for each expert and projection, or the stack itself. ``pieces`` maps rows to
tensors. gpt-oss stores a stack transposed, ``[E, in, out]``: its rows are columns there.

Families may gate in another way (gpt-oss: rows of gate and up in turn, clamped), have no gate
(Nemotron-H: ``D_e act(U_e x)``) and add biases; ``model.expert_kinds`` tells them apart.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dist_peft.core.span import Span
from dist_peft.model.expert_exchange import ExpertExchange, RowRoutes
from dist_peft.model.expert_kinds import ExpertForm
from dist_peft.model.frozen_linear import FrozenWeight, PrequantizedLinear
from dist_peft.quant.codec import Codec
from dist_peft.quant.grouped_matmul import RowGroups, count_sorted, frozen_grouped_matmul
from dist_peft.store.reader import RowReader

__all__ = [
    "ExpertStack",
    "FrozenExperts",
    "StoredPieces",
]


@dataclass(frozen=True)
class StoredPieces:
    """Rows of a stack whose pieces are packed weights of a prequantized base.

    Attributes:
        parts: which rows each weight has, in order.
    """

    parts: tuple[tuple[Span, PrequantizedLinear], ...]

    @property
    def codec(self) -> Codec:
        """Codec of the rows, the same of all weights."""
        return self.parts[0][1].codec

    @property
    def has_middle_zeros(self) -> bool:
        """Whether all weights are integers without zero points."""
        return all(weight.has_middle_zeros for _, weight in self.parts)

    def read_packed_rows(self, reader: RowReader, span: Span) -> Tensor:
        """Read packed rows ``uint8 [len(span), row_bytes]``; of each weight, those in ``span``."""
        found = [
            weight.read_packed_rows(reader, common.shifted_by(-own.start))
            for own, weight in self.parts
            if len(common := own.intersect(span))
        ]
        if not found:  # no row: the first weight gives the size of none
            return self.parts[0][1].read_packed_rows(reader, Span(0, 0))
        return found[0] if len(found) == 1 else torch.cat(found)


class ExpertStack(FrozenWeight):
    """One projection of all experts of a layer.

    Args:
        experts: their number.
        in_features, out_features: shape of one expert's weight, ``[out, in]``.
        codec, source, device, stored: see ``FrozenWeight``.

    Attributes:
        limit: why adapters and packed formats leave the stack as it is; empty: they do not.
        own_rows: packed rows of ``own_experts``, where this rank computes these alone
            (``ExpertExchange``); None: ``packed`` has those of all experts.
    """

    limit: str = ""
    own_rows: nn.Parameter | None = None
    own_experts: Span = Span(0, 0)

    def __init__(
        self,
        experts: int,
        in_features: int,
        out_features: int,
        codec: Codec,
        source: str,
        device: torch.device | str,
        stored: PrequantizedLinear | None = None,
    ) -> None:
        super().__init__(in_features, experts * out_features, codec, source, device, stored)
        self.experts, self.out_features = experts, out_features

    def forward(self, x: Tensor, groups: RowGroups) -> Tensor:
        """Multiply ``x`` [n, in], whose rows are sorted by expert, to [n, out]."""
        packed: Tensor = self.packed
        if self.own_rows is not None and len(self.own_experts):
            packed, groups = self.own_rows, groups.select(self.own_experts)
        return frozen_grouped_matmul(x, packed, self.codec, self.in_features, groups)

    @property
    def rows_each(self) -> int:
        return self.out_features

    def list_piece_shapes(self) -> dict[str, tuple[int, ...]]:
        """Map each piece's name to its shape in an unquantized base."""
        if self.is_transposed:
            (piece,) = self.pieces
            return {piece.name: (self.experts, self.in_features, self.out_features)}
        whole = len(self.pieces) == 1 and self.experts > 1
        return {
            piece.name: (self.experts, self.out_features, self.in_features)
            if whole
            else (len(piece.span), self.in_features)
            for piece in self.pieces
        }

    def extra_repr(self) -> str:
        return (
            f"experts={self.experts}, in_features={self.in_features}, "
            f"out_features={self.out_features}, codec={self.codec.name}"
        )


class FrozenExperts(nn.Module):
    """Replacement of a ``transformers`` experts module with the same forward signature.

    Args:
        stacks: the products by their names, first and second, such as ``gate_up_proj``
            ``[2I, H]`` and ``down_proj`` ``[H, I]`` of each expert; or gate, up and the second.
        act_fn: between them, for the usual ``act(gate) * up``.
        apply_gate: another function of the first product, ``[n, 2I]`` to ``[n, I]``, in its place.
        bias_dtype: type of the biases ``[E, 2I]`` and ``[E, H]``; None: there are none.

    Attributes:
        exchange: sends rows to other ranks; None: this rank computes its own.
        is_routed: tokens choose experts, so that fewer may be gathered than there are.
        form: how they are called (``model.expert_kinds``).
        known_counts: rows by expert of the next call, if they have been read on the host.
    """

    exchange: ExpertExchange | None = None
    is_routed: bool = True
    form: ExpertForm = "routed"
    known_counts: list[int] | None = None

    def __init__(
        self,
        stacks: Mapping[str, ExpertStack],
        act_fn: Callable[[Tensor], Tensor] | None = None,
        apply_gate: Callable[[Tensor], Tensor] | None = None,
        bias_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.stack_names = tuple(stacks)
        self.num_experts = next(iter(stacks.values())).experts
        self.out_features = stacks[self.stack_names[-1]].out_features
        for name, stack in stacks.items():
            *owners, own = name.split(".")
            holder: nn.Module = self
            for owner in owners:  # DBRX has the parameters in a module of its own
                if owner not in holder._modules:
                    holder.add_module(owner, nn.Module())
                holder = holder.get_submodule(owner)
            holder.add_module(own, stack)
        self.act_fn = act_fn
        self._other_gate = apply_gate
        for name, stack in stacks.items():
            bias = None
            if bias_dtype is not None:
                shape, device = (stack.experts, stack.out_features), stack.packed.device
                bias = nn.Parameter(torch.empty(shape, dtype=bias_dtype, device=device), False)
            if bias is not None or "." not in name:  # DBRX has none
                self.register_parameter(f"{name}_bias", bias)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Compute the weighted sum of the chosen experts' outputs.

        Args:
            hidden_states: ``[n, H]``, or ``[..., H]`` of as many tokens.
            top_k_index: long ``[n, k]``, the experts of each token.
            top_k_weights: ``[n, k]``, factors of the experts' outputs.

        Returns:
            In shape and type of ``hidden_states``.
        """
        shape = hidden_states.shape
        hidden_states = hidden_states.reshape(-1, shape[-1])
        if self.exchange is not None and self.exchange.joins_rows(top_k_index.shape[1]):
            choices = (top_k_index, top_k_weights)
            joined = self.exchange.compute_joined(hidden_states, *choices, self._multiply)
            return joined.view(shape)
        chosen = top_k_index.flatten()
        by_expert, order = chosen.sort(stable=True)
        tokens = order // top_k_index.shape[1]
        groups, routes = self._group_rows(count_sorted(by_expert, self.num_experts), len(tokens))
        groups = groups.with_tokens(tokens, len(hidden_states))
        x = hidden_states[tokens]
        y = self._multiply_at_owners(x, groups, routes, by_expert)
        # back in the tokens' order: a sum over k is deterministic, where adding to an index
        # is not on a GPU
        y = y[order.argsort()].view(*top_k_index.shape, y.shape[-1])
        y = y * top_k_weights.unsqueeze(-1)
        return y.sum(1).to(hidden_states.dtype).view(shape)

    def count_rows(self, *inputs: Tensor) -> Tensor:
        """Return long ``[E]``, the rows that ``inputs`` of a forward give each expert."""
        return count_sorted(inputs[1].flatten().sort().values, self.num_experts)

    def count_choices(self, *inputs: Tensor) -> tuple[int, int]:
        """Return how many tokens ``inputs`` of a forward have, and experts each of them."""
        tokens, chosen = inputs[1].shape
        return tokens, chosen

    def _group_rows(self, counts: Tensor, assumed_rows: int) -> tuple[RowGroups, RowRoutes | None]:
        """Read the ``counts`` [E] of rows, the only copy to the host in a call."""
        known, self.known_counts = self.known_counts, None
        if known is not None:
            return RowGroups.from_counts(known), None
        if self.exchange is None:
            return RowGroups.read_counts(counts, assumed_rows), None
        routes = self.exchange.plan_routes(counts, assumed_rows)
        return routes.groups, routes

    def _multiply_at_owners(
        self, x: Tensor, groups: RowGroups, routes: RowRoutes | None, chosen: Tensor
    ) -> Tensor:
        if routes is None:
            return self._multiply(x, groups, chosen)
        return routes.compute_at_owners(x, groups, self._multiply)

    def _multiply(self, x: Tensor, groups: RowGroups, chosen: Tensor) -> Tensor:
        """Both products of ``x`` [n, H], sorted by expert; ``chosen`` [n]: the expert of a row."""
        *first, second = self.stack_names
        parts = [self._multiply_stack(name, x, groups, chosen) for name in first]
        y = self._apply_gate(parts[0] if len(parts) == 1 else torch.cat(parts, -1))
        return self._multiply_stack(second, y, groups, chosen)

    def _multiply_stack(self, name: str, x: Tensor, groups: RowGroups, chosen: Tensor) -> Tensor:
        y: Tensor = self.get_submodule(name)(x, groups)
        bias = self._parameters.get(f"{name}_bias")
        return y if bias is None else y + bias[chosen].to(y.dtype)

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        if self._other_gate is not None:
            return self._other_gate(gate_up)
        assert self.act_fn is not None
        gate, up = gate_up.chunk(2, -1)
        return self.act_fn(gate) * up
