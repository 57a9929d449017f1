"""Which sequences of a batch belong to which adapter."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor

from dist_peft.core.errors import UserError

__all__ = ["RowShares"]


class RowShares:
    """The shares of the batch that is computed next; one object for all layers of a model.

    Attributes:
        only: the adapter that all rows belong to; None: they are split.
    """

    def __init__(self) -> None:
        self.only: int | None = None
        self._shares: list[tuple[int, int]] = []
        self._positions: int | None = None

    def split_batch(self, shares: Sequence[tuple[int, int]], positions: int | None = None) -> None:
        """Give the sequences of the next batch to adapters, until the next call.

        Args:
            shares: number of an adapter and of its sequences, in the order of the batch.
            positions: tokens of a sequence, padding included; None: not checked.
        """
        self._shares, self._positions = list(shares), positions

    @contextmanager
    def give_all(self, adapter: int) -> Iterator[None]:
        """Give all rows of the forwards in the body to one adapter."""
        before, self.only = self.only, adapter
        try:
            yield
        finally:
            self.only = before

    def make_contexts(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """Return contexts of one call of a block, for its forward pass and for its recomputation:
        both compute rows of the same adapter."""
        return nullcontext(), _OneAdapter(self, self.only)

    def list_parts(self, x: Tensor, path: str) -> list[tuple[int, int]]:
        """Return the number of an adapter and of its rows of ``x``, in their order.

        Args:
            x: ``[B, S, in]``, or ``[B * S, in]`` where a model has flattened its batch.
            path: of the layer, for the message.

        Raises:
            UserError: rows of ``x`` are other tokens than those of the batch in their order.
        """
        sequences = sum(count for _, count in self._shares)
        length = self._positions or x.shape[:-1].numel() // sequences
        if x.dim() == 3 and x.shape[:2] == (sequences, length):
            return self._shares
        if x.dim() == 2 and x.shape[0] == sequences * length:
            return [(adapter, count * length) for adapter, count in self._shares]
        raise UserError(
            f"sweep: {path} computes {list(x.shape[:-1])} rows of a batch of {sequences} sequences "
            f"of {length} tokens, so that they cannot be assigned to adapters; leave it out of "
            "adapter.target_modules, or run the points one by one"
        )


class _OneAdapter(AbstractContextManager[None]):
    """All rows are those of ``only``; may be entered again."""

    def __init__(self, shares: RowShares, only: int | None) -> None:
        self._shares, self._only = shares, only
        self._outer: list[int | None] = []

    def __enter__(self) -> None:
        self._outer.append(self._shares.only)
        self._shares.only = self._only

    def __exit__(self, *error: Any) -> None:
        self._shares.only = self._outer.pop()
