"""Where in a block bottleneck adapters go, found by the block's structure.

A block has an attention, an MLP and norms. Sites depend on which module returns ``f``, the
summand of the residual stream ``x``, and which module is given ``x`` (see
``adapters.bottleneck``)::

    sequential   x1 = x0 + attention(norm(x0));  x2 = x1 + mlp(norm'(x1))      Llama, Qwen, OPT, ...
    parallel     x2 = x0 + attention(norm(x0)) + mlp(norm'(x0))                Phi, GPT-NeoX
    sandwich     x1 = x0 + norm2(attention(norm(x0)));  ...                    Gemma 2 and 3
    post-norm    x1 = norm(x0 + attention(x0));  x2 = norm'(x1 + mlp(x1))      BERT, RoBERTa

In parallel blocks there is no stream between the sublayers, so ``pfeiffer`` reads ``f`` alone. In
sandwich blocks the adapter changes the input of the second norm. In post-norm blocks ``pfeiffer``
reads ``norm(x + f)``. In ModernBERT, which is sequential, adapters are given ``norm'(x1)`` as
``x``. All are AdapterHub's choices.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

from torch import nn

from dist_peft.adapters.bottleneck.layer import Reads
from dist_peft.core.errors import UserError
from dist_peft.model.experts import ExpertStack
from dist_peft.model.frozen_linear import FrozenLinear

__all__ = ["AdapterSite", "find_adapter_sites", "is_norm_module", "read_hidden_size"]

Placement = Literal["pfeiffer", "houlsby", "parallel"]

_NORMS: tuple[tuple[str, ...], ...] = (
    ("input_layernorm", "post_attention_layernorm"),
    ("self_attn_layer_norm", "final_layer_norm"),
    ("input_layernorm",),
    (
        "input_layernorm",
        "pre_feedforward_layernorm",
        "post_attention_layernorm",
        "post_feedforward_layernorm",
    ),
)
"""A block's norms. The first is given ``x`` before attention, the second (or only) one before the
MLP."""

_MODERNBERT = ("attn", "attn_norm", "mlp", "mlp_norm")
_POST_NORM = {"attention_adapters": "attention.output", "output_adapters": "output"}
"""Site -> the part that ends its sublayer: ``LayerNorm(dense(y) + x)``."""


_READS: dict[Placement, Reads] = {"houlsby": "output", "parallel": "stream", "pfeiffer": "sum"}


@dataclass(frozen=True)
class AdapterSite:
    """One place for an adapter.

    Attributes:
        name: AdapterHub's: attention_adapters or output_adapters; also the adapter's attribute.
        output: the part of the block that returns ``f``, first where it returns several values.
        stream: the part that is given ``x``.
        reads: the adapter's ``h``.
        argument: which of the arguments of ``stream`` is ``x``.
        parent: the part that the adapter becomes a child of; the block itself if empty.
        norm: the part that norms ``h``, where it is normed.
    """

    name: str
    output: str
    stream: str
    reads: Reads
    argument: int = 0
    parent: str = ""
    norm: str | None = None

    def join_block_path(self, block: str) -> str:
        """The adapter's name in a model, where ``block`` is that of the block."""
        return ".".join(part for part in (block, self.parent, self.name) if part)


def read_hidden_size(model: nn.Module) -> int:
    """``d`` of a ``transformers`` model."""
    return int(cast(Any, model).config.get_text_config().hidden_size)


def is_norm_module(module: nn.Module, hidden: int) -> bool:
    """Whether it scales the residual stream: one number a channel, and nothing inside."""
    weight = module._parameters.get("weight")
    return weight is not None and tuple(weight.shape) == (hidden,) and not module._modules


def find_adapter_sites(
    model: nn.Module, placement: Placement
) -> Iterator[tuple[str, list[AdapterSite]]]:
    """Path of each block and its sites, first to last.

    Raises:
        UserError: the blocks are built otherwise than those that are known.
    """
    hidden = read_hidden_size(model)
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    blocks = [
        (f"{path}.{number}", block)
        for path, modules in lists
        for number, block in enumerate(modules)
        if _find_residual_writers(block, hidden)
    ]
    if not blocks:
        raise UserError(
            f"adapter.kind bottleneck: {type(model).__name__} has no decoder blocks with linears "
            f"of {hidden} outputs; use adapter.kind lora"
        )
    for path, block in blocks:
        yield path, _find_block_sites(path, block, hidden, placement)


_PACKED = (FrozenLinear, ExpertStack)


def _find_residual_writers(block: nn.Module, hidden: int) -> list[str]:
    """Return the children with a linear of ``hidden`` outputs, as a summand of ``x`` must have."""
    return [
        name
        for name, child in block.named_children()
        if any(isinstance(m, _PACKED) and m.out_features == hidden for m in child.modules())
    ]


def _find_block_sites(
    path: str, block: nn.Module, hidden: int, placement: Placement
) -> list[AdapterSite]:
    wanted = list(_POST_NORM) if placement == "houlsby" else ["output_adapters"]
    if all(_is_post_norm_block(block, part, hidden) for part in _POST_NORM.values()):
        return [_build_post_norm_site(name, placement) for name in wanted]
    if tuple(sorted(dict(block.named_children()))) == _MODERNBERT:
        parts = {"attention_adapters": "attn", "output_adapters": "mlp"}
        return [AdapterSite(name, parts[name], parts[name], _READS[placement]) for name in wanted]
    writers = _find_residual_writers(block, hidden)
    attention = [name for name in writers if "attn" in name or "attention" in name]
    others = [name for name in writers if name not in attention]
    norms = [name for name, child in block.named_children() if is_norm_module(child, hidden)]
    known = next((names for names in _NORMS if set(names) == set(norms)), None)
    norm_is_first = getattr(block, "do_layer_norm_before", True)  # OPT 350m: false
    if len(attention) != 1 or not others or known is None or not norm_is_first:
        raise UserError(
            f"adapter.kind bottleneck does not know blocks like {path}: attention "
            f"{attention or 'not found'}, MLP {others or 'not found'}, norms {norms}"
            f"{'' if norm_is_first else ' after the sublayers'}; use adapter.kind lora"
        )
    parallel_block = len(known) == 1 or getattr(block, "use_parallel_residual", False)
    before_attention, before_mlp = known[0], known[min(1, len(known) - 1)]
    reads = _READS[placement]
    if placement == "pfeiffer" and parallel_block:
        reads = "output"
    if placement == "pfeiffer" and len(known) == 4:
        raise UserError(
            f"adapter.placement pfeiffer reads the sum of the residual stream and a sublayer's "
            f"output, but {path} has a norm between the two; use houlsby or parallel"
        )
    after_mlp = AdapterSite("output_adapters", others[-1], before_mlp, reads)
    if placement != "houlsby":
        return [after_mlp]
    return [AdapterSite("attention_adapters", attention[0], before_attention, reads), after_mlp]


def _is_post_norm_block(block: nn.Module, path: str, hidden: int) -> bool:
    """Whether the part at ``path`` is ``norm(dense(y) + x)``, as in BERT."""
    part: nn.Module | None = block
    for name in path.split("."):
        part = None if part is None else part._modules.get(name)
    if part is None or not {"dense", "LayerNorm"} <= part._modules.keys():
        return False
    dense, norm = part.get_submodule("dense"), part.get_submodule("LayerNorm")
    norm = norm.get_submodule("base") if "base" in norm._modules else norm  # it is trainable
    return (
        isinstance(dense, FrozenLinear)
        and dense.out_features == hidden
        and is_norm_module(norm, hidden)
    )


def _build_post_norm_site(name: str, placement: Placement) -> AdapterSite:
    part = _POST_NORM[name]
    reads = "normed" if placement == "pfeiffer" else _READS[placement]
    return AdapterSite(
        name,
        output=f"{part}.dense",
        stream=part,
        reads=reads,
        argument=1,
        parent=part,
        norm=f"{part}.LayerNorm",
    )
