"""How experts whose work is shared by ranks meet the engine that moves rows and factors.

``model.experts`` and the adapters of experts call these; ``engine.token_exchange`` and
``engine.expert_factors`` implement them.
"""

from collections.abc import Callable, Iterable
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from dist_peft.quant.grouped_matmul import RowGroups

__all__ = [
    "AdaptsExperts",
    "ExpertExchange",
    "ExpertProduct",
    "FactorFetch",
    "RowRoutes",
    "list_expert_factors",
]

ExpertProduct = Callable[[Tensor, RowGroups, Tensor], Tensor]
"""Computes rows ``[n, H]`` of this rank's experts, which come from all ranks, to ``[n, H]``; gets
also their groups and the expert of each."""


class RowRoutes(Protocol):
    """Where the rows of one call of experts are computed.

    Attributes:
        groups: of the caller's rows.
    """

    groups: RowGroups

    def compute_at_owners(self, x: Tensor, groups: RowGroups, compute: ExpertProduct) -> Tensor:
        """Return the results ``[n, H]`` of ``x`` [n, H], both sorted as ``groups`` says.

        Args:
            groups: the routes' own, with tokens.
            compute: of rows that are sorted by expert.
        """
        ...


class ExpertExchange(Protocol):
    """Has the rows of experts computed by the ranks that keep them (``engine.token_exchange``).

    Attributes:
        bytes_exchanged: received by this rank so far.
    """

    bytes_exchanged: int

    def plan_routes(self, counts: Tensor, assumed_rows: int) -> RowRoutes:
        """Tell all ranks how many rows each expert gets; see ``RowGroups.read_counts``."""
        ...

    def joins_rows(self, chosen: int) -> bool:
        """Whether tokens of ``chosen`` experts may have several of them on one rank."""
        ...

    def compute_joined(
        self, x: Tensor, chosen: Tensor, weights: Tensor, compute: ExpertProduct
    ) -> Tensor:
        """Return the weighted sums ``[n, H]`` of the ``chosen`` [n, k] experts' results."""
        ...


class FactorFetch(Protocol):
    """Gets trainable factors of experts to the rank that computes these
    (``engine.expert_factors``)."""

    def fetch_own(self, *factors: nn.Parameter) -> tuple[Tensor, ...]:
        """Return the parts of this rank's experts, in their order; of one if there are none."""
        ...


@runtime_checkable
class AdaptsExperts(Protocol):
    """An adapter module around an ``ExpertStack``, whose parameters have a part for each expert.

    Attributes:
        factor_exchange: gets the parts of this rank's experts; None: it has those of all.
    """

    factor_exchange: FactorFetch | None

    def locate_experts(self) -> dict[str, tuple[int, Tensor]]:
        """Map each parameter ``[rows, columns]`` to the dimension along which the experts' parts
        are, and the positions there of each, long ``[E, r]``."""
        ...


def list_expert_factors(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    """Return the parameters that have a part for each expert."""
    found = (m for m in modules if isinstance(m, AdaptsExperts))
    return [m.get_parameter(name) for m in found for name in m.locate_experts()]
