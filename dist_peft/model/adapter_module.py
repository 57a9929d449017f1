"""The interface between a model and the adapter layers attached to it.

``model.load`` fills parameters in the model's order, and those of an adapter layer right after the
module that it adapts. Adapter methods implement these protocols; there is no other pair.
``adapters.adapter_switch`` switches layers off and on again.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol, runtime_checkable

from torch import Tensor, nn

from dist_peft.core.span import Span

__all__ = [
    "AdapterModule",
    "InitializesFromBase",
    "JoinedForm",
    "KeepsPackedRows",
    "Reduce",
    "RowUpdate",
    "SwitchableLayer",
]

JoinedForm = Literal["change", "weight_norm", "rescaling", "embedding"] | None
"""How layers of several adapters share their base's product (``adapters.joined``); None: they
cannot."""

Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor over the ranks that share a weight; all of them call it in the same order."""


class RowUpdate(NamedTuple):
    """New values of a rank's own rows of the frozen parameter ``owner.name``."""

    owner: nn.Module
    name: str
    rows: Tensor


@runtime_checkable
class AdapterModule(Protocol):
    """An ``nn.Module`` whose own parameters are initialized by a formula, not from a file."""

    @property
    def base(self) -> nn.Module:
        """The adapted module, after whose parameters the own ones are filled."""
        ...

    def init_rows(self, name: str, span: Span) -> Tensor:
        """Return the initial values of rows ``span`` of the own parameter ``name``; called once.

        The same whatever the number of ranks.
        """
        ...


@runtime_checkable
class InitializesFromBase(AdapterModule, Protocol):
    """An adapter module around a ``FrozenLinear`` whose initialization can depend on its rows."""

    @property
    def needs_base_rows(self) -> bool:
        """Whether it does depend on them, with the settings of this run; the same on all ranks."""
        ...

    def prepare_base_rows(self, rows: Tensor, span: Span, reduce: Reduce) -> Tensor:
        """Return the rows to quantize; called once and before ``init_rows``.

        Args:
            rows: float32 ``[len(span), in]``, this rank's rows of the weight, maybe none.
            span: which rows these are.
            reduce: sums over the ranks that share the weight.
        """
        ...


@runtime_checkable
class KeepsPackedRows(InitializesFromBase, Protocol):
    """One that also takes this rank's rows of a prequantized base as its files have them."""

    def keep_packed_rows(self, packed: Tensor, span: Span) -> None:
        """Take packed rows ``span``, ``uint8 [len(span), row_bytes]``; called once, before
        ``prepare_base_rows``, where the base comes quantized."""
        ...


class SwitchableLayer(nn.Module):
    """A module of an adapter that computes the base's function while ``is_enabled`` is false.

    Attributes:
        keeps_base: the base's function is still there; false where its rows were replaced.
    """

    is_enabled: bool = True
    keeps_base: bool = True

    @property
    def joined_form(self) -> JoinedForm:
        """How several such layers share the module that they wrap."""
        return None
