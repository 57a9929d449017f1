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
block, whichever experts the tokens chose, so that all ranks call the same collectives;
*dequantized* is one expert at a time, and only those that got tokens.

The files have a tensor for each expert and projection, or the stack itself. ``pieces`` maps rows to
tensors. gpt-oss stores a stack transposed, ``[E, in, out]``: its rows are columns there.

Families may gate in another way (gpt-oss: rows of gate and up in turn, clamped) and add biases;
``transformers`` declares both, and the gate is its own function.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from dist_peft.core.errors import UserError
from dist_peft.core.span import Span
from dist_peft.model.frozen_linear import FrozenWeight, PrequantizedLinear
from dist_peft.quant.assumed_device import get_assumed_device
from dist_peft.quant.codec import Codec
from dist_peft.quant.frozen_matmul import frozen_grouped_matmul
from dist_peft.store.reader import RowReader

__all__ = [
    "STACKS",
    "ExpertStack",
    "FrozenExperts",
    "Pieces",
    "StackPiece",
    "StoredPieces",
    "count_expert_tokens",
    "find_expert_modules",
    "find_own_gate",
    "find_router_linears",
]

STACKS = ("gate_up_proj", "down_proj")
"""The two parameters of an experts module, in its order."""


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
    """

    pieces: Pieces = ()
    is_transposed: bool = False

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

    def forward(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        """Multiply ``x`` [n, in], sorted by expert with ``counts`` [E] rows each, to [n, out]."""
        return frozen_grouped_matmul(x, self.packed, self.codec, self.in_features, counts)

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
        gate_up_proj, down_proj: ``[2I, H]`` and ``[H, I]`` of each expert.
        act_fn: between them, for the usual ``act(gate) * up``.
        apply_gate: another function of ``[n, 2I]`` to ``[n, I]`` in its place.
        bias_dtype: type of the biases ``[E, 2I]`` and ``[E, H]``; None: there are none.
    """

    gate_up_proj_bias: nn.Parameter | None
    down_proj_bias: nn.Parameter | None

    def __init__(
        self,
        gate_up_proj: ExpertStack,
        down_proj: ExpertStack,
        act_fn: Callable[[Tensor], Tensor] | None = None,
        apply_gate: Callable[[Tensor], Tensor] | None = None,
        bias_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_experts = gate_up_proj.experts
        self.gate_up_proj, self.down_proj, self.act_fn = gate_up_proj, down_proj, act_fn
        self._other_gate = apply_gate
        for name, stack in zip(STACKS, (gate_up_proj, down_proj), strict=True):
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
        chosen = top_k_index.flatten()
        order = chosen.argsort(stable=True)
        counts = count_expert_tokens(chosen, self.num_experts)
        x = hidden_states[order // top_k_index.shape[1]]
        y = self.gate_up_proj(x, counts)
        if self.gate_up_proj_bias is not None:
            y = y + self.gate_up_proj_bias[chosen[order]].to(y.dtype)
        y = self.down_proj(self._apply_gate(y), counts)
        if self.down_proj_bias is not None:
            y = y + self.down_proj_bias[chosen[order]].to(y.dtype)
        # back in the tokens' order: a sum over k is deterministic, where adding to an index
        # is not on a GPU
        y = y[order.argsort()].view(*top_k_index.shape, -1) * top_k_weights.unsqueeze(-1)
        return y.sum(1).to(hidden_states.dtype)

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        if self._other_gate is not None:
            return self._other_gate(gate_up)
        assert self.act_fn is not None
        gate, up = gate_up.chunk(2, -1)
        return self.act_fn(gate) * up


def count_expert_tokens(chosen: Tensor, experts: int) -> list[int]:
    """Return how many of ``chosen`` [n] name each expert."""
    if get_assumed_device() is not None:  # no values: four experts or fewer get equal shares
        used, total = min(experts, 4), chosen.numel()
        shares = [total * (i + 1) // used - total * i // used for i in range(used)]
        return shares + [0] * (experts - used)
    counts: list[int] = chosen.bincount(minlength=experts).tolist()
    return counts


def find_expert_modules(blocks: Sequence[nn.Module]) -> list[nn.Module]:
    """Return the experts modules of ``transformers`` in ``blocks``.

    ``transformers`` declares how a family's experts compute (``use_experts_implementation``);
    modules with another declaration than above, or without one, are refused.

    Raises:
        UserError: experts of another kind.
    """
    found = []
    for block in blocks:
        for module in block.modules():
            matrices = [p for p in module.parameters(recurse=False) if p.dim() > 1]
            if not matrices or "expert" not in type(module).__name__.lower():
                continue
            if why := _explain_unsupported_experts(module):
                raise UserError(
                    f"base.path has mixture-of-experts layers of class {type(module).__name__}, "
                    f"{why}; read are experts as Mixtral, Qwen-MoE, OLMoE and gpt-oss have them: "
                    "a gate of gate_up_proj [experts, 2I, H], then down_proj [experts, H, I], "
                    "either of them perhaps transposed"
                )
            found.append(module)
    return found


def find_router_linears(model: nn.Module, experts: Sequence[nn.Module]) -> set[int]:
    """Return ``id`` of the linears that route tokens to experts, or weight a shared expert.

    They are siblings of ``experts`` (``shared_expert_gate`` of Qwen2-MoE), or lie in a sibling
    module and have an output for each expert. Linears of shared experts are neither. Most families'
    routers are not linears.
    """
    counts = {id(module): module.get_parameter(STACKS[0]).shape[0] for module in experts}
    found: set[int] = set()
    for module in model.modules():
        children = list(module.children())
        count = next((counts[id(child)] for child in children if id(child) in counts), None)
        for child in children if count is not None else ():
            inside = (m for m in child.modules() if type(m) is nn.Linear)
            found |= {id(m) for m in inside if m is child or m.out_features == count}
    return found


_DECLARATION = "transformers.integrations.moe"
_DECLARED: dict[str, tuple[bool, str]] = {
    "has_gate": (True, "which have no gate"),
    "has_post_expert_norm": (False, "which have a norm of their own"),
}
"""Attribute of an experts module -> its value here, and the meaning of the opposite."""


def find_own_gate(module: Any) -> Callable[[Tensor], Tensor] | None:
    """Return the gate of an experts module of ``transformers``; None: the usual
    ``act_fn(gate) * up``, which the declaration adds."""
    gate = getattr(type(module), "_apply_gate", None)
    if getattr(gate, "__module__", "") == _DECLARATION:
        return None
    own: Callable[[Tensor], Tensor] = module._apply_gate
    return own


def _explain_unsupported_experts(module: Any) -> str | None:
    """Return why ``FrozenExperts`` cannot replace ``module``; None if it can."""
    own = {name: tuple(p.shape) for name, p in module.named_parameters()}
    if not hasattr(module, "is_transposed"):
        return "whose products transformers does not declare"
    for name, (wanted, why) in _DECLARED.items():
        if getattr(module, name, wanted) is not wanted:
            return why
    biases = tuple(f"{name}_bias" for name in STACKS) if getattr(module, "has_bias", False) else ()
    if set(own) != {*STACKS, *biases}:
        return f"whose parameters are {', '.join(own)}"
    experts, hidden, twice = own[STACKS[0]]
    if not module.is_transposed:
        hidden, twice = twice, hidden
    down = (twice // 2, hidden) if module.is_transposed else (hidden, twice // 2)
    if own["down_proj"] != (experts, *down):
        return f"whose shapes are {list(own['gate_up_proj'])} and {list(own['down_proj'])}"
    if biases and (own[biases[0]], own[biases[1]]) != ((experts, twice), (experts, hidden)):
        return f"whose biases are {list(own[biases[0]])} and {list(own[biases[1]])}"
    if find_own_gate(module) is not None:
        return None
    if not getattr(module, "is_concatenated", True):
        return "whose gate and up rows are interleaved"
    return None if hasattr(module, "act_fn") else "whose gate computes something else"
