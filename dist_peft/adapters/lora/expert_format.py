"""LoRA on experts as PEFT stores it.

PEFT names the parameters of experts in ``list_target_parameters`` and wraps the *module* that owns
them,
once for each parameter, in the module's order. Which parameter a tensor belongs to is therefore
known by how deep it is wrapped::

    target_parameters: [experts.gate_up_proj, experts.down_proj]
        PATH.experts.base_layer.lora_A.weight     of gate_up_proj, the inner wrapper
        PATH.experts.lora_A.weight                of down_proj, the outer one
    target_parameters: [experts.down_proj]
        PATH.experts.lora_A.weight                of down_proj

For the shapes see ``adapters.lora.expert_layer``.

Of some families with experts, PEFT (0.21) takes ``gate_proj``, ``up_proj``, ``down_proj`` and
``gate`` in ``target_modules`` for names of experts in older checkpoints, and would not find a
shared expert's or a dense layer's linears of these names. So they are named by their weight in
``list_target_parameters``, too, which gives the same tensors under the same names.
"""

from collections.abc import Collection, Iterable, Sequence

from torch import Tensor

from dist_peft.model.expert_kinds import STACK_NAMES

__all__ = [
    "is_taken_for_experts",
    "list_target_parameters",
    "split_expert_factors",
    "to_expert_stack_path",
    "to_public_expert_path",
]

_WRAPPED = ".base_layer"
_OLD_NAMES = ("gate_proj", "up_proj", "down_proj", "gate")


def to_public_expert_path(stack: str, adapted: Collection[str]) -> str:
    """Return the prefix of the adapted ``stack``'s tensors in the file, given all adapted paths."""
    owner, _, own = stack.rpartition(".")
    inner = own != STACK_NAMES[-1] and f"{owner}.{STACK_NAMES[-1]}" in adapted
    return owner + _WRAPPED * inner


def to_expert_stack_path(path: str, targets: Iterable[str]) -> str | None:
    """The reverse: the stack that tensors beginning with ``path`` belong to; None: no stack.

    Args:
        targets: ``list_target_parameters``; each matches a parameter whose name it ends.
    """
    owner = path.removesuffix(_WRAPPED)
    # a bare name is an expert's parameter, not whatever a linear could own
    known = [t for t in targets if "." in t or owner.rpartition(".")[2] == "experts"]
    own = [s for s in STACK_NAMES if any(f".{owner}.{s}".endswith(f".{t}") for t in known)]
    if not own:
        return None
    return f"{owner}.{own[0] if owner != path else own[-1]}"


def split_expert_factors(A: Tensor, B: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """``[E * r, in]``, ``[out, r * E]`` -> the same ``A``, and ``[E * out, r]``: rows as the stack
    has them."""
    return A, B.view(B.shape[0], r, -1).permute(2, 0, 1).flatten(0, 1).contiguous()


def is_taken_for_experts(path: str) -> bool:
    """Whether PEFT would take a linear of a model with experts for one of them, by its name."""
    return path.rpartition(".")[2] in _OLD_NAMES


def list_target_parameters(parameters: Sequence[str], others: Iterable[str]) -> list[str]:
    """The shortest ``list_target_parameters`` that mean ``parameters`` (full names) and none of
    ``others``."""

    others = set(others) - set(parameters)
    # with the owner's name, and of a linear's weight with the name before
    short = sorted({".".join(n.split(".")[-2 - n.endswith(".weight") :]) for n in parameters})
    endings = tuple(f".{name}" for name in short)
    return sorted(parameters) if any(f".{n}".endswith(endings) for n in others) else short
