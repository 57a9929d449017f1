"""Which experts of ``transformers`` ``model.experts`` replaces, and how these compute.

``transformers`` declares it for most families (``use_experts_implementation``): whether weights
are transposed, the gate, biases. The classes without a declaration are known here, by module and
name (``model.expert_variants`` computes them).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from dist_peft.core.errors import UserError

__all__ = [
    "STACK_NAMES",
    "ExpertForm",
    "ExpertKind",
    "describe_experts",
    "find_activation",
    "find_expert_modules",
    "find_own_gate",
    "find_router_linears",
]

STACK_NAMES = ("gate_up_proj", "up_proj", "down_proj")
"""Names of the parameters of experts modules, in a module's order."""

_DECLARATION = "transformers.integrations.moe"
_LATENT = ("fc1_latent_proj", "fc2_latent_proj")
"""Nemotron-H's siblings of experts that change the size of tokens."""

ExpertForm = Literal["routed", "scaled_inputs", "with_identities", "shared", "one_product"]
"""How experts are called: with the routes of tokens, or as a class of ``model.expert_variants``."""

_UNDECLARED = ("Step3p7Experts",)
"""Classes without a declaration that compute as Mixtral's do, with their own ``_apply_gate``."""


@dataclass(frozen=True)
class ExpertKind:
    """How the experts of a class compute and are stored.

    Attributes:
        names: of the parameters: the first product's, or gate's and up's of one each; then the
            second product's. A single product has one.
        transposed: those that are ``[E, in, out]``.
        form: how they are called.
        limit: why adapters and packed formats leave the experts as they are; empty: they do not.
    """

    names: tuple[str, ...] = ("gate_up_proj", "down_proj")
    transposed: tuple[str, ...] = ()
    form: ExpertForm = "routed"
    limit: str = ""

    def find_stack_shape(self, module: nn.Module, name: str) -> tuple[int, int, int]:
        """Return experts, rows and columns, ``[E, out, in]``, of the weights in a parameter."""
        shape = tuple(module.get_parameter(name).shape)
        if len(shape) == 2:  # of all experts, one below the other
            count = int(module.num_experts)  # type: ignore[arg-type]
            shape = (count, shape[0] // count, shape[1])
        if self.form == "with_identities":  # those have no weights, and rows nevertheless
            shape = (int(module.num_routed_experts), *shape[1:])  # type: ignore[arg-type]
        experts, out, columns = shape
        return (experts, columns, out) if name in self.transposed else (experts, out, columns)


_BOTH = ("gate_up_proj", "down_proj")
_KNOWN = {
    "llama4.Llama4TextExperts": ExpertKind(transposed=_BOTH, form="scaled_inputs"),
    "dbrx.DbrxExperts": ExpertKind(
        ("mlp.w1", "mlp.v1", "mlp.w2"),
        transposed=("mlp.w2",),
        limit="its files have the matrices of all experts as one, which PEFT adapts as one",
    ),
    "jetmoe.JetMoeParallelExperts": ExpertKind(
        ("weight",),
        form="one_product",
        limit="its experts are of attention too, a product each, which no format has names for",
    ),
    "longcat_flash.LongcatFlashExperts": ExpertKind(
        form="with_identities",
        limit="some of its experts have no weights, and gate_up_proj has rows for them",
    ),
    "inkling.InklingSharedExperts": ExpertKind(
        ("gate_proj", "up_proj", "down_proj"),
        form="shared",
        limit="its shared experts are stacked, which no format has names for",
    ),
}
"""Package and class of experts without a declaration."""


def describe_experts(module: Any) -> ExpertKind | None:
    """Return the kind of an experts module; None: nothing is known of its class."""
    kind = type(module)
    package = kind.__module__.removeprefix("transformers.models.").partition(".")[0]
    if (known := _KNOWN.get(f"{package}.{kind.__name__}")) is not None:
        return known
    if not hasattr(module, "is_transposed"):
        return ExpertKind() if kind.__name__ in _UNDECLARED else None
    names = ("gate_up_proj" if getattr(module, "has_gate", True) else "up_proj", "down_proj")
    return ExpertKind(names, names if module.is_transposed else ())


def find_expert_modules(blocks: Sequence[nn.Module]) -> list[nn.Module]:
    """Return the experts modules of ``transformers`` in ``blocks``.

    Raises:
        UserError: experts of another kind.
    """
    found: list[nn.Module] = []
    inside: set[int] = set()
    for block in blocks:
        for module in block.modules():
            matrices = [p for p in module.parameters(recurse=False) if p.dim() > 1]
            is_known = describe_experts(module) is not None
            if id(module) in inside or "expert" not in type(module).__name__.lower():
                continue
            if not (matrices or is_known):
                continue
            inside |= {id(child) for child in module.modules()}
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
    counts = {
        id(module): kind.find_stack_shape(module, kind.names[0])[0]
        for module in experts
        if (kind := describe_experts(module)) is not None and kind.form != "shared"
    }
    found: set[int] = set()
    for module in model.modules():
        children = list(module.children())
        count = next((counts[id(child)] for child in children if id(child) in counts), None)
        for name, child in module.named_children() if count is not None else ():
            inside = (m for m in child.modules() if type(m) is nn.Linear)
            is_own = name not in _LATENT
            found |= {id(m) for m in inside if (m is child and is_own) or m.out_features == count}
    return found


def find_activation(module: Any) -> Callable[[Any], Any] | None:
    """Return the function of an experts module's gate; None: it has none."""
    owner = getattr(module, "mlp", module)  # DBRX
    found: Callable[[Any], Any] | None = getattr(owner, "act_fn", None) or getattr(
        owner, "activation_fn", None
    )
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
        return "whose products transformers does not declare"
    if getattr(module, "has_post_expert_norm", False):
        return "which have a norm of their own"
    biases = tuple(f"{n}_bias" for n in kind.names) if getattr(module, "has_bias", False) else ()
    if set(own) != {*kind.names, *biases}:
        return f"whose parameters are {', '.join(own)}"
    if kind in _KNOWN.values():
        return None
    first, second = (own[name] for name in kind.names)
    if len(first) != 3:
        return f"whose shapes are {list(first)} and {list(second)}"
    experts, wide, hidden = kind.find_stack_shape(module, kind.names[0])
    inner = wide // 2 if kind.names[0] == "gate_up_proj" else wide
    if len(second) != 3 or kind.find_stack_shape(module, kind.names[1]) != (experts, hidden, inner):
        return f"whose shapes are {list(first)} and {list(second)}"
    if biases and (own[biases[0]], own[biases[1]]) != ((experts, wide), (experts, hidden)):
        return f"whose biases are {list(own[biases[0]])} and {list(own[biases[1]])}"
    if find_own_gate(module) is not None:
        return None
    if not getattr(module, "is_concatenated", True):
        return "whose gate and up rows are interleaved"
    return None if hasattr(module, "act_fn") else "whose gate computes something else"
