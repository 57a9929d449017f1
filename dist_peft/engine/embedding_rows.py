"""Gathers of those rows of a frozen embedding that the tokens of a micro-batch name.

A whole table travels for every micro-batch otherwise: 131 MB of a vocabulary of 32 000 and a hidden
size of 1024 in float32, of which 512 tokens read 2 MB at most. Here each rank asks the ranks that
keep its rows, and gets what it asked for::

    ids         [B, S]  ->  u different ones, ascending; numbers [B, S] of ids among them
    counts      of the rows that each rank asks each other for: one small all-gather, so that all
                ranks decide alike
    ids         to the ranks that keep them, one all-to-all
    rows        back, one all-to-all:
                rank 0   | rows of rank 0 | rows of rank 1 |    ascending, as shares are
    parameter   its storage has these u rows alone; the embedding looks up numbers instead of ids

The rows are copies, so that results are those of the whole table, bit for bit. Where ranks together
ask for as many bytes as whole tables have, the whole one is gathered, as for an id that is outside
of the table, at which the embedding then fails.

The ranks read the counts before they continue. A GPU would have to finish first, for each
micro-batch, therefore tables on GPUs are gathered whole.
"""

from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_peft.engine.compat import all_gather
from dist_peft.engine.gather_unit import GatherUnit, ShardedParameter
from dist_peft.model.frozen_embedding import FrozenEmbedding
from dist_peft.quant.assumed_device import get_assumed_device

__all__ = ["EmbeddingRows", "RowOwner", "can_look_up_rows", "register_lookup_hooks"]

_ID_BYTES = 8
_TOO_MANY = 2**40
"""Rows that a rank asks for with an id outside of the table: the whole one is gathered."""


class RowOwner(Protocol):
    """The ranks that share the rows."""

    group: dist.ProcessGroup
    device: torch.device
    parts: int
    bytes_gathered: int


def can_look_up_rows(module: nn.Module, input_embedding: nn.Module) -> bool:
    """Return whether a forward of ``module`` reads the rows of its ids and no others, and computes
    the same from other numbers of the same rows.

    Of other classes than ``nn.Embedding`` only the input embedding is known to: some embeddings of
    positions compute with their ids.
    """
    if isinstance(module, FrozenEmbedding):
        return True
    if not isinstance(module, nn.Embedding) or module.max_norm is not None:
        return False
    return module is input_embedding or type(module).forward is nn.Embedding.forward


class EmbeddingRows:
    """The rows of one table.

    Args:
        slot: of the table, ``[V, ...]``.
        owner: the ranks; ``bytes_gathered`` counts the rows that this one gets.
    """

    def __init__(self, slot: ShardedParameter, owner: RowOwner) -> None:
        self.slot, self.owner = slot, owner

    def gather_rows(self, ids: Tensor) -> Tensor | None:
        """Give the table's storage the rows of ``ids`` alone; all ranks call this together.

        Args:
            ids: of tokens, any shape and integer type; there may be none.

        Returns:
            Their numbers among these rows, int64 in the shape of ``ids``. None, on all ranks
            alike: the whole table is to be gathered, and nothing has changed.
        """
        assumed = get_assumed_device()
        if self.owner.parts == 1 or (assumed or self.owner.device).type != "cpu":
            return None
        if assumed is not None:
            return self._assume_rows(ids)
        vocabulary = self.slot.shape[0]
        wanted, numbers = torch.unique(ids.long(), return_inverse=True)
        is_known = not len(wanted) or (int(wanted[0]) >= 0 and int(wanted[-1]) < vocabulary)
        counts = self._exchange_counts(wanted if is_known else None)
        if not self._is_smaller(int(counts.sum())):
            return None
        own = self.owner.group.rank()
        self._fetch_rows(wanted, counts[own].tolist(), counts[:, own].tolist())
        return numbers

    def _exchange_counts(self, wanted: Tensor | None) -> Tensor:
        """Return ``[ranks, ranks]``: how many rows each asks each other for; of a rank without
        ``wanted`` more than there are."""
        parts = self.owner.parts
        own_rows = max(1, -(-self.slot.shape[0] // parts))
        own = torch.full((parts,), _TOO_MANY)
        if wanted is not None:
            own = torch.bincount(wanted // own_rows, minlength=parts)
        counts = torch.empty(parts * parts, dtype=own.dtype)
        all_gather(counts, own, group=self.owner.group)
        return counts.view(parts, parts)

    def _is_smaller(self, rows: int) -> bool:
        """Return whether ``rows`` of all ranks together are fewer bytes than a table for each."""
        whole = self.owner.parts * self.slot.capacity
        return rows * (self.slot.row_bytes + _ID_BYTES) < whole

    def _fetch_rows(self, wanted: Tensor, asked: list[int], asking: list[int]) -> None:
        group, width = self.owner.group, self.slot.row_bytes
        requests = torch.empty(sum(asking), dtype=torch.long)
        dist.all_to_all_single(requests, wanted, asking, asked, group=group)
        first = group.rank() * (self.slot.part // width)
        sent = self.slot.local.view(-1, width).index_select(0, requests - first)
        rows = self._allocate_rows(len(wanted)).view(-1, width)
        dist.all_to_all_single(rows, sent, asked, asking, group=group)

    def _allocate_rows(self, count: int) -> Tensor:
        """Return the table's storage, now of ``count`` rows, as bytes."""
        size = count * self.slot.row_bytes
        self.owner.bytes_gathered += size
        # an empty lookup takes the address of the first row, too
        self.slot.bytes.untyped_storage().resize_(max(size, self.slot.row_bytes))
        return self.slot.bytes[:size]

    def _assume_rows(self, ids: Tensor) -> Tensor | None:
        """Do as for different tokens on every rank, which a plan has no values of."""
        count = min(ids.numel(), self.slot.shape[0])
        if not self._is_smaller(self.owner.parts * count):
            return None
        sent = torch.empty(count * self.slot.row_bytes, dtype=torch.uint8)
        self._allocate_rows(count).copy_(sent)
        return ids


def register_lookup_hooks(module: nn.Module, unit: GatherUnit, owner: RowOwner) -> None:
    """Hook an embedding, the only parameter of ``unit``: its backward does not read the table."""
    rows = EmbeddingRows(unit.slots[0], owner)

    def before_forward(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Tensor] | None:
        unit.calls += 1
        if len(inputs) == 1 and not unit.whole and unit.pending is None:
            numbers = rows.gather_rows(inputs[0])
            if numbers is not None:
                unit.has_some_rows = True
                return (numbers,)
        unit.wait_gathered()
        return None

    def after_forward(module: nn.Module, inputs: Any, output: Any) -> None:
        unit.calls -= 1
        if not unit.calls:
            unit.free_full_tensors()

    module.register_forward_pre_hook(before_forward)
    module.register_forward_hook(after_forward, always_call=True)
