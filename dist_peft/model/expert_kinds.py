"""Which experts of ``transformers`` ``model.experts`` replaces, and how these compute.

``transformers`` declares it for most families (``use_experts_implementation``): whether weights
are transposed, the gate, biases. Llama 4 has no declaration, as its experts take every token
multiplied by its score; its class is known here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from dist_peft.core.errors import UserError

__all__ = [
    "STACK_NAMES",
    "ExpertKind",
    "describe_experts",
    "find_expert_modules",
    "find_own_gate",
    "find_router_linears",
]

STACK_NAMES = ("gate_up_proj", "up_proj", "down_proj")
"""Names of the parameters of experts modules, in a module's order."""

_DECLARATION = "transformers.integrations.moe"
_LATENT = ("fc1_latent_proj", "fc2_latent_proj")
"""Nemotron-H's siblings of experts that change the size of tokens."""

_OWN_PRODUCTS = {
    "DbrxExpertGLU": "which multiply by w2 transposed, and have gate and up in tensors of their "
    "own, w1 and v1",
    "JetMoeParallelExperts": "which are of attention too, a single product each, called by the "
    "number of tokens of each expert",
    "LongcatFlashExperts": "of which some have no weights and return their input, while "
    "gate_up_proj has rows for them",
}
"""Class of experts without a declaration -> how they differ from those that are read."""

_LLAMA4 = "transformers.models.llama4.modeling_llama4"


@dataclass(frozen=True)
class ExpertKind:
    """How the experts of a class compute and are stored.

    Attributes:
        names: of the parameters, the first product's and the second's.
        is_transposed: they are ``[E, in, out]``.
        has_scaled_inputs: see ``experts.ScaledInputExperts``.
    """

    names: tuple[str, str] = ("gate_up_proj", "down_proj")
    is_transposed: bool = False
    has_scaled_inputs: bool = False


def describe_experts(module: Any) -> ExpertKind | None:
    """Return the kind of an experts module; None: nothing is known of its class."""
    kind = type(module)
    if kind.__module__ == _LLAMA4 and kind.__name__ == "Llama4TextExperts":
        return ExpertKind(is_transposed=True, has_scaled_inputs=True)
    if not hasattr(module, "is_transposed"):
        return None
    names = ("gate_up_proj" if getattr(module, "has_gate", True) else "up_proj", "down_proj")
    return ExpertKind(names, bool(module.is_transposed))


def find_expert_modules(blocks: Sequence[nn.Module]) -> list[nn.Module]:
    """Return the experts modules of ``transformers`` in ``blocks``.

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
                    "either of them perhaps transposed, or Nemotron-H: up_proj [experts, I, H] "
                    "without a gate"
                )
            found.append(module)
    return found


def find_router_linears(model: nn.Module, experts: Sequence[nn.Module]) -> set[int]:
    """Return ``id`` of the linears that route tokens to experts, or weight a shared expert.

    They are siblings of ``experts`` (``shared_expert_gate`` of Qwen2-MoE), or lie in a sibling
    module and have an output for each expert. Linears of shared experts are neither. Most families'
    routers are not linears.
    """
    counts = {id(module): next(module.parameters(recurse=False)).shape[0] for module in experts}
    found: set[int] = set()
    for module in model.modules():
        children = list(module.children())
        count = next((counts[id(child)] for child in children if id(child) in counts), None)
        for name, child in module.named_children() if count is not None else ():
            inside = (m for m in child.modules() if type(m) is nn.Linear)
            is_own = name not in _LATENT
            found |= {id(m) for m in inside if (m is child and is_own) or m.out_features == count}
    return found


def find_own_gate(module: Any) -> Callable[[Any], Any] | None:
    """Return the function between an experts module's products; None: the usual
    ``act_fn(gate) * up``, which the declaration adds."""
    if not getattr(module, "has_gate", True):
        activation: Callable[[Any], Any] = module.act_fn
        return activation
    gate = getattr(type(module), "_apply_gate", None)
    if gate is None or getattr(gate, "__module__", "") == _DECLARATION:
        return None
    own: Callable[[Any], Any] = module._apply_gate
    return own


def _explain_unsupported_experts(module: Any) -> str | None:
    """Return why ``FrozenExperts`` cannot replace ``module``; None if it can."""
    own = {name: tuple(p.shape) for name, p in module.named_parameters()}
    if (kind := describe_experts(module)) is None:
        unknown = "whose products transformers does not declare"
        return _OWN_PRODUCTS.get(type(module).__name__, unknown)
    if getattr(module, "has_post_expert_norm", False):
        return "which have a norm of their own"
    biases = tuple(f"{n}_bias" for n in kind.names) if getattr(module, "has_bias", False) else ()
    if set(own) != {*kind.names, *biases}:
        return f"whose parameters are {', '.join(own)}"
    first, second = (own[name] for name in kind.names)
    if len(first) != 3:
        return f"whose shapes are {list(first)} and {list(second)}"
    (experts, wide, hidden) = first if not kind.is_transposed else (first[0], first[2], first[1])
    inner = wide // 2 if kind.names[0] == "gate_up_proj" else wide
    down = (inner, hidden) if kind.is_transposed else (hidden, inner)
    if second != (experts, *down):
        return f"whose shapes are {list(first)} and {list(second)}"
    if biases and (own[biases[0]], own[biases[1]]) != ((experts, wide), (experts, hidden)):
        return f"whose biases are {list(own[biases[0]])} and {list(own[biases[1]])}"
    if find_own_gate(module) is not None:
        return None
    if not getattr(module, "is_concatenated", True):
        return "whose gate and up rows are interleaved"
    return None if hasattr(module, "act_fn") else "whose gate computes something else"
