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
from functools import reduce

import torch
from torch import Tensor, nn

from dist_peft.core.span import Span
from dist_peft.model.expert_exchange import ExpertExchange, RowRoutes
from dist_peft.model.frozen_linear import FrozenWeight, PrequantizedLinear
from dist_peft.quant.codec import Codec
from dist_peft.quant.grouped_matmul import RowGroups, count_sorted, frozen_grouped_matmul
from dist_peft.store.reader import RowReader

__all__ = [
    "ExpertStack",
    "FrozenExperts",
    "Pieces",
    "ScaledInputExperts",
    "StackPiece",
    "StoredPieces",
]


@dataclass(frozen=True)
class StackPiece:
    """Consecutive rows of a stack that are one tensor of the files.

    Attributes:
        name: the tensor, ``[rows, in]``; or of any shape that is these rows if flattened.
        span: which rows of the stack.
    """

    name: str
    span: Span


Pieces = tuple[StackPiece, ...]
"""All rows of a stack, in order."""


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
        pieces: where the rows are in the files; set when the model is built.
        is_transposed: the parameter of ``transformers`` is ``[E, in, out]``, as is an unquantized
            tensor in the files.
        own_rows: packed rows of ``own_experts``, where this rank computes these alone
            (``ExpertExchange``); None: ``packed`` has those of all experts.
    """

    pieces: Pieces = ()
    is_transposed: bool = False
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

    def read_packed_rows(self, reader: RowReader, span: Span) -> Tensor:
        """Read rows of the stack; of each tensor that holds some of them, only these are read."""
        if self.is_transposed:
            return self._read_columns(reader, span)
        dtypes = [reader.index.find_tensor(piece.name).dtype for piece in self.pieces]
        rows = torch.empty(len(span), self.in_features, dtype=reduce(torch.promote_types, dtypes))
        for piece in self.pieces:
            common = piece.span.intersect(span)
            if len(common):
                read = reader.read_flat_rows(piece.name, common.shifted_by(-piece.span.start))
                rows[common.shifted_by(-span.start).slice] = read
        return rows

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

    def _read_columns(self, reader: RowReader, span: Span) -> Tensor:
        """Read rows that are columns of each expert's matrix in the only piece."""
        (piece,) = self.pieces
        parts = []
        for expert in range(span.start // self.out_features, -(-span.stop // self.out_features)):
            first = expert * self.out_features
            own = Span(first, first + self.out_features).intersect(span)
            matrix = Span(expert * self.in_features, (expert + 1) * self.in_features)
            columns = own.shifted_by(-first)
            parts.append(reader.read_flat_rows(piece.name, matrix, columns).T)
        if not parts:
            dtype = reader.index.find_tensor(piece.name).dtype
            return torch.empty(0, self.in_features, dtype=dtype)
        rows = torch.cat(parts)
        if reader.hashes is not None:
            reader.hashes.add_packed_rows(piece.name, span.start, rows.view(torch.uint8))
        return rows

    def extra_repr(self) -> str:
        return (
            f"experts={self.experts}, in_features={self.in_features}, "
            f"out_features={self.out_features}, codec={self.codec.name}"
        )


class FrozenExperts(nn.Module):
    """Replacement of a ``transformers`` experts module with the same forward signature.

    Args:
        stacks: the products by their names, first and second, such as ``gate_up_proj``
            ``[2I, H]`` and ``down_proj`` ``[H, I]`` of each expert.
        act_fn: between them, for the usual ``act(gate) * up``.
        apply_gate: another function of the first product, ``[n, 2I]`` to ``[n, I]``, in its place.
        bias_dtype: type of the biases ``[E, 2I]`` and ``[E, H]``; None: there are none.

    Attributes:
        exchange: sends rows to other ranks; None: this rank computes its own.
        known_counts: rows by expert of the next call, if they have been read on the host.
    """

    exchange: ExpertExchange | None = None
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
        for name, stack in stacks.items():
            self.add_module(name, stack)
        self.act_fn = act_fn
        self._other_gate = apply_gate
        for name, stack in stacks.items():
            bias = None
            if bias_dtype is not None:
                shape, device = (stack.experts, stack.out_features), stack.packed.device
                bias = nn.Parameter(torch.empty(shape, dtype=bias_dtype, device=device), False)
            self.register_parameter(f"{name}_bias", bias)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Compute the weighted sum of the chosen experts' outputs.

        Args:
            hidden_states: ``[n, H]``.
            top_k_index: long ``[n, k]``, the experts of each token.
            top_k_weights: ``[n, k]``, factors of the experts' outputs.

        Returns:
            ``[n, H]`` in the type of ``hidden_states``.
        """
        if self.exchange is not None and self.exchange.joins_rows(top_k_index.shape[1]):
            choices = (top_k_index, top_k_weights)
            return self.exchange.compute_joined(hidden_states, *choices, self._multiply)
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
        return y.sum(1).to(hidden_states.dtype)

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
        first, second = self.stack_names
        y = self._modules[first](x, groups)  # type: ignore[misc]
        y = self._add_bias(first, y, chosen)
        y = self._modules[second](self._apply_gate(y), groups)  # type: ignore[misc]
        return self._add_bias(second, y, chosen)

    def _add_bias(self, name: str, y: Tensor, chosen: Tensor) -> Tensor:
        bias = self._parameters[f"{name}_bias"]
        return y if bias is None else y + bias[chosen].to(y.dtype)

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        if self._other_gate is not None:
            return self._other_gate(gate_up)
        assert self.act_fn is not None
        gate, up = gate_up.chunk(2, -1)
        return self.act_fn(gate) * up


class ScaledInputExperts(FrozenExperts):
    """Llama 4's experts: each gets every token, multiplied by its score, 0 where it was not chosen.

    An input of zeros has an output of zeros, and gives no gradient to input and weights, as there
    are no biases and the gate is a product. So rows of zeros are left out, exactly.
    """

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
