"""Which sequences of a batch belong to which adapter."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

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
