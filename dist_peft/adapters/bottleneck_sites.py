"""Where in a decoder block bottleneck adapters go, found by the block's structure.

A block has an attention, an MLP and norms. What matters is which module gives ``f``, what is added
to the residual stream ``x``, and which module is given ``x`` (see ``adapters.bottleneck``)::

    sequential   x1 = x0 + attention(norm(x0));  x2 = x1 + mlp(norm'(x1))      Llama, Qwen, OPT, ...
    parallel     x2 = x0 + attention(norm(x0)) + mlp(norm'(x0))                Phi, GPT-NeoX
    sandwich     x1 = x0 + norm2(attention(norm(x0)));  ...                    Gemma 2 and 3

In parallel blocks there is no stream between the sublayers, so ``pfeiffer`` reads ``f`` alone. In
sandwich blocks the adapter changes what the second norm is given. Both are AdapterHub's choices.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

from torch import nn

from dist_peft.adapters.bottleneck import Reads
from dist_peft.core.errors import UserError
from dist_peft.model.frozen_linear import FrozenLinear

__all__ = ["Site", "find_sites", "hidden_size", "is_norm"]

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


_READS: dict[Placement, Reads] = {"houlsby": "output", "parallel": "stream", "pfeiffer": "sum"}


@dataclass(frozen=True)
class Site:
    """One place for an adapter.

    Attributes:
        name: AdapterHub's: attention_adapters or output_adapters; also the adapter's attribute.
        output: the block's child that gives ``f``, first where it gives several things.
        stream: the block's child that is given ``x``.
        reads: the adapter's ``h``.
    """

    name: str
    output: str
    stream: str
    reads: Reads


def hidden_size(model: nn.Module) -> int:
    """``d`` of a ``transformers`` model."""
    return int(cast(Any, model).config.get_text_config().hidden_size)


def is_norm(module: nn.Module, hidden: int) -> bool:
    """Whether it scales the residual stream: one number a channel, and nothing inside."""
    weight = module._parameters.get("weight")
    return weight is not None and tuple(weight.shape) == (hidden,) and not module._modules


def find_sites(model: nn.Module, placement: Placement) -> Iterator[tuple[str, list[Site]]]:
    """Path of each decoder block and its sites, first to last.

    Raises:
        UserError: the blocks are built otherwise than those that are known.
    """
    hidden = hidden_size(model)
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    blocks = [
        (f"{path}.{number}", block)
        for path, modules in lists
        for number, block in enumerate(modules)
        if _writers(block, hidden)
    ]
    if not blocks:
        raise UserError(
            f"adapter.kind bottleneck: {type(model).__name__} has no decoder blocks with linears "
            f"of {hidden} outputs; use adapter.kind lora"
        )
    for path, block in blocks:
        yield path, _sites(path, block, hidden, placement)


def _writers(block: nn.Module, hidden: int) -> list[str]:
    """Children with a linear that gives ``hidden`` numbers, as what is added to ``x`` must."""
    return [
        name
        for name, child in block.named_children()
        if any(isinstance(m, FrozenLinear) and m.out_features == hidden for m in child.modules())
    ]


def _sites(path: str, block: nn.Module, hidden: int, placement: Placement) -> list[Site]:
    writers = _writers(block, hidden)
    attention = [name for name in writers if "attn" in name or "attention" in name]
    others = [name for name in writers if name not in attention]
    norms = [name for name, child in block.named_children() if is_norm(child, hidden)]
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
    after_mlp = Site("output_adapters", others[-1], before_mlp, reads)
    if placement != "houlsby":
        return [after_mlp]
    return [Site("attention_adapters", attention[0], before_attention, reads), after_mlp]
