"""Attach several adapters to one model on meta."""

from collections.abc import Mapping, Sequence
from typing import Protocol, cast

from torch import nn

from dist_peft.adapters.joined.joined_embedding import JoinedEmbedding
from dist_peft.adapters.joined.layer import JoinedLayer
from dist_peft.adapters.joined.rescaling import JoinedRescaling
from dist_peft.adapters.joined.row_shares import RowShares
from dist_peft.adapters.joined.weight_norms import JoinedWeightNorms
from dist_peft.adapters.protocol import Adapter
from dist_peft.core.errors import UserError
from dist_peft.model.adapter_module import JoinedForm, SwitchableLayer

__all__ = ["HasLayers", "attach_joined", "get_alone_name", "get_joined_prefix"]

_FORMS: dict[JoinedForm, type[JoinedLayer]] = {
    "change": JoinedLayer,
    "weight_norm": JoinedWeightNorms,
    "rescaling": JoinedRescaling,
    "embedding": JoinedEmbedding,
}


class HasLayers(Adapter, Protocol):
    """A method that wraps modules.

    Attributes:
        layers: the wrappers by path, once attached.
    """

    @property
    def layers(self) -> Mapping[str, SwitchableLayer]: ...


def attach_joined(model: nn.Module, adapters: Sequence[HasLayers], shares: RowShares) -> None:
    """Wrap the targets of all ``adapters``; each is attached as it would be alone.

    Args:
        model: its linears are not wrapped yet.
        shares: set before each forward.

    Raises:
        UserError: the conditions of ``Adapter.attach_to_model``.
    """
    layers: dict[str, dict[int, nn.Module]] = {}
    for number, adapter in enumerate(adapters):
        adapter.attach_to_model(model)
        for name, layer in adapter.layers.items():
            if layer.joined_form is None:
                raise UserError(
                    f"sweep: {name} are experts of a mixture, whose rows are in the order of the "
                    "experts; list adapter.target_modules without experts, such as [q_proj, "
                    "k_proj, v_proj, o_proj], or run the points one by one"
                )
            layers.setdefault(name, {})[number] = layer
            model.set_submodule(name, cast(nn.Module, layer.base))
    for name, own in layers.items():
        joined = _FORMS[cast(SwitchableLayer, next(iter(own.values()))).joined_form]
        model.set_submodule(name, joined(model.get_submodule(name), name, own, shares))


def get_joined_prefix(number: int) -> str:
    """Return the part of names that marks the parameters of adapter ``number``."""
    return f".points.{number}."


def get_alone_name(name: str, number: int) -> str | None:
    """Return the name that parameter ``name`` has in a run of adapter ``number`` alone; None: it is
    another's parameter, or the base's."""
    prefix = get_joined_prefix(number)
    return name.replace(prefix, ".") if prefix in name else None
