"""Parameters that rest as rows and are gathered together (see ``engine.row_shards``).

An all-gather brings the shares of all ranks one after the other. Of several parameters in one
all-gather each rank's part lies in pieces, which are copied to the parameters' places. Of one
parameter it is the rows in their order, with the padding of the last ranks after them, so that it
can be gathered in place::

    storage    | rows of rank 0 | rows of rank 1 | rows of rank 2, padding |
    parameter  | ................................................ |
"""

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_peft.core.span import Span, row_span

__all__ = ["ALIGN_BYTES", "GatherOwner", "GatherUnit", "ShardedParameter"]

ALIGN_BYTES = 16
"""Every parameter's rows start at a multiple, so that they can be viewed in its own type."""


class GatherOwner(Protocol):
    """Where units rest and how they are gathered."""

    parts: int

    def allocate_resting(self, size: int) -> Tensor: ...

    def all_gather_chunks(
        self, local: Tensor, output: Tensor | None = None
    ) -> tuple[Tensor, dist.Work | None]: ...


class ShardedParameter:
    """One parameter: this rank's rows as bytes, and the place where it becomes whole.

    Args:
        meta: the parameter, on meta.
        parts: number of ranks.
        in_place: its place also holds the padding of the last ranks' rows, so that an all-gather
            can write to it.
        together: so many rows are never cut; a divisor of all.
    """

    def __init__(
        self, meta: nn.Parameter, parts: int, in_place: bool = False, together: int = 1
    ) -> None:
        self.parameter, self.parts, self.together = meta, parts, together
        self.shape, self.dtype, self.requires_grad = meta.shape, meta.dtype, meta.requires_grad
        self.nbytes = meta.numel() * meta.element_size()
        self.row_bytes = self.nbytes // meta.shape[0] if meta.shape[0] else 0
        self.part = self.row_bytes * len(self.get_row_span(0))
        self.capacity = parts * self.part if in_place else self.nbytes
        self.local = torch.empty(0, dtype=torch.uint8)
        self.bytes = self.local

    def get_row_span(self, index: int) -> Span:
        """Return the rows of rank ``index``."""
        span = row_span(self.shape[0] // self.together, self.parts, index)
        return Span(span.start * self.together, span.stop * self.together)

    def fill_local_rows(self, rows: Tensor, device: torch.device | None = None) -> nn.Parameter:
        """Store ``rows`` and return the parameter, whole in shape and empty in storage.

        Args:
            device: of the whole parameter; by default that of ``local``.
        """
        data = rows.contiguous().view(-1).view(torch.uint8)
        self.local[: data.numel()].copy_(data)
        flat = torch.empty(self.capacity, dtype=torch.uint8, device=device or self.local.device)
        whole = flat[: self.nbytes].view(self.dtype).view(self.shape)
        self.bytes = flat.data  # writing through it does not count as a change of the parameter
        self.parameter = nn.Parameter(whole, requires_grad=self.requires_grad)
        self.free_full_tensor()
        return self.parameter

    def allocate_full_tensor(self) -> Tensor:
        """Return the place of the whole parameter, ``capacity`` bytes."""
        # the storage object stays: views that autograd saved in forward see the bytes again
        self.bytes.untyped_storage().resize_(self.capacity)
        return self.bytes

    def scatter_chunks(self, chunks: Tensor) -> None:
        """``chunks`` [parts, part]: each rank's rows, the last ones padded."""
        self.allocate_full_tensor()
        if not self.nbytes:
            return
        full, rest = divmod(self.nbytes, self.part)
        self.bytes[: full * self.part].view(full, self.part).copy_(chunks[:full])
        if rest:
            self.bytes[full * self.part : self.nbytes].copy_(chunks[full, :rest])

    def free_full_tensor(self) -> None:
        self.bytes.untyped_storage().resize_(0)


class GatherUnit:
    """Slots that travel together, in one all-gather; those gathered in place in one each.

    Args:
        slots: of which those of ``in_place`` are gathered into their own storage.
        kept: stays whole once it has been gathered.
    """

    def __init__(
        self,
        slots: Sequence[ShardedParameter],
        owner: GatherOwner,
        in_place: Sequence[ShardedParameter] = (),
        kept: bool = False,
    ) -> None:
        self.together = [slot for slot in slots if slot not in in_place]
        self.in_place = in_place
        self.slots = [*self.together, *in_place]
        self.owner, self.kept = owner, kept
        self.offsets, size = [], 0
        for slot in self.slots:
            self.offsets.append(size)
            size += -(-slot.part // ALIGN_BYTES) * ALIGN_BYTES
        self.local = owner.allocate_resting(size)
        for slot, offset in zip(self.slots, self.offsets, strict=True):
            slot.local = self.local[offset : offset + slot.part]
        self.size_together = self.offsets[len(self.together)] if in_place else size
        self.whole = False
        self.has_backward = False
        self.calls = 0
        """Forwards of its modules that have begun and not ended."""
        self.has_some_rows = False
        """Whether the rows of some tokens are there (``engine.embedding_rows``)."""
        self.pending: list[tuple[Tensor, dist.Work | None]] | None = None

    def start_all_gather(self) -> None:
        """Begin to gather, unless that is done or under way."""
        if self.whole or self.pending is not None or not self.slots:
            return
        self.pending = [
            self.owner.all_gather_chunks(slot.local, slot.allocate_full_tensor())
            for slot in self.in_place
        ]
        if self.together:
            self.pending.append(self.owner.all_gather_chunks(self.local[: self.size_together]))

    def wait_gathered(self) -> None:
        """Wait for the all-gather and set the full parameters."""
        self.start_all_gather()
        if self.pending is None:
            return
        gathered = self._wait_for_collectives()
        if self.together:
            chunks = gathered[-1].view(self.owner.parts, -1)
            for slot, offset in zip(self.together, self.offsets, strict=False):
                slot.scatter_chunks(chunks[:, offset : offset + slot.part])
        self.whole = True

    def release_full_tensors(self) -> None:
        """Free them after use, unless they are kept."""
        if not self.kept:
            self.free_full_tensors()

    def free_full_tensors(self) -> None:
        if self.pending is not None:
            self._wait_for_collectives()  # which still write
            self.whole = True
        if self.whole or self.has_some_rows:
            for slot in self.slots:
                slot.free_full_tensor()
        self.whole = self.has_some_rows = False

    def _wait_for_collectives(self) -> list[Tensor]:
        assert self.pending is not None
        pending, self.pending = self.pending, None
        for _, work in pending:
            if work is not None:
                work.wait()
        return [output for output, _ in pending]
