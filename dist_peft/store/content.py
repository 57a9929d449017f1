"""Hashes of a base's tensors, computed while their rows are read for another purpose.

Rows are hashed in blocks, counted from the tensor's first row, and a tensor's hash is a sum over
its rows, each with the hash of the block that it lies in and its own number::

    h(tensor) = sum over rows i of  mix(XXH3(bytes of the block with row i), i)     mod 2^64

The sum does not depend on the order, so that it is the same however rows are distributed over ranks
and cut into chunks; the ranks add their sums up. A rank whose rows begin or end inside a block
reads the rest of it from its own file (``BlockReader``), so that its rows are compared as well: at
most two blocks of 64 KiB for each range of rows.

A row is the last dimension: of a stack of experts ``[E, out, in]`` every expert has ``out`` rows;
of a vector a row is an element. A block is as many rows, a power of two, as fit into 64 KiB, and
one row of longer ones. ``mix`` is the finalizer of SplitMix64 (Steele, Lea, Flood 2014), for all
rows at once. Every byte counts; a change is missed with a chance of 2^-64.

Where the time of it goes (``benchmarks/hash_cost.py``): a call for each row of 8 KB takes as long
as XXH3 itself, hence blocks; XXH3 needs them in the processor's cache, so they are hashed panel by
panel between the reads of a file (``RowsBeingRead``); arithmetic on arrays costs by the call at
that size, so numbers of rows are mixed in once for all consecutive rows that were read.

This finds other weights, damaged files and mistaken directories; it is no protection against an
adversary, who can construct another base of the same hash.
"""

import threading
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from dist_peft.core.span import Span
from dist_peft.store.format import TensorSpec

__all__ = [
    "BlockReader",
    "RowHashes",
    "RowLayout",
    "RowsBeingRead",
    "TensorHashSum",
    "hash_rows",
    "is_comparable_hash",
    "tag_hash",
    "to_signed_int64",
]

_VERSION = "2"
"""In front of every hash: those of another version cannot be compared. 1 hashed row by row and had
no number."""

_BLOCK_BYTES = 1 << 16
_PANEL_BYTES = 1 << 19
"""Read before it is hashed: it should still be in the processor's cache then."""

BlockReader = Callable[[Span], memoryview]
"""Reads rows of the tensor at hand, for their hash alone."""

_digest: Callable[[Any], int] = xxhash.xxh3_64_intdigest

_MASK = (1 << 64) - 1
_GOLDEN, _MIX_1, _MIX_2 = (
    np.uint64(number) for number in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


def to_signed_int64(value: int) -> int:
    """Reinterpret an unsigned 64-bit hash as int64, whose sums wrap modulo 2^64."""
    return value - 2**64 if value >= 2**63 else value


@dataclass(frozen=True)
class RowLayout:
    """How a tensor's bytes are hashed.

    Attributes:
        rows: see the module.
        row_bytes: of each.
        block_rows: rows that are hashed together.
    """

    rows: int
    row_bytes: int
    block_rows: int = 1

    @classmethod
    def of_tensor(cls, spec: TensorSpec) -> "RowLayout":
        """Return the layout of a tensor as its file has it."""
        if len(spec.shape) < 2:
            rows, row_bytes = spec.num_rows, spec.dtype.itemsize
        else:
            rows = torch.Size(spec.shape[:-1]).numel()
            row_bytes = spec.shape[-1] * spec.dtype.itemsize
        block_rows = 1 << max(0, (_BLOCK_BYTES // max(1, row_bytes)).bit_length() - 1)
        return cls(rows, row_bytes, block_rows)

    def block_of_row(self, row: int) -> Span:
        """Return the rows that are hashed together with ``row``."""
        start = row - row % self.block_rows
        return Span(start, min(start + self.block_rows, self.rows))

    def list_panel_ends(self, span: Span) -> list[int]:
        """Return where to pause in reading ``span`` to hash what was read: row numbers."""
        step = max(1, _PANEL_BYTES // (self.block_rows * self.row_bytes)) * self.block_rows
        return [*range(span.start - span.start % step + step, span.stop, step), span.stop]


def hash_rows(data: Tensor, layout: RowLayout) -> int:
    """Return the sum of the hashes of all rows of a tensor.

    Args:
        data: contiguous ``uint8`` on the CPU, of ``layout``'s size.

    Returns:
        Below 2^64.
    """
    known = TensorHashSum(layout)
    if data.numel():
        rows = RowsBeingRead(known, 0, data)
        rows.hash_up_to(data.numel())
        rows.finish_hashing()
    return known.total


def tag_hash(text: str) -> str:
    """Return ``text``, made of row hashes, behind the number of their kind and a colon."""
    return f"{_VERSION}:{text}"


def is_comparable_hash(text: str) -> bool:
    """Return whether ``text`` is a hash of the kind that this version computes."""
    return text.startswith(tag_hash(""))


def _sum_row_hashes(digests: NDArray[np.uint64], first: int) -> int:
    """Sum over rows from number ``first`` on, given the digest of each row's block."""
    places = np.arange(first + 1, first + 1 + len(digests), dtype=np.uint64)
    total = _mix_bits(digests ^ _mix_bits(places * _GOLDEN)).sum(dtype=np.uint64)
    return int(total) & _MASK


def _mix_bits(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finalizer, a permutation of the numbers below 2^64."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * _MIX_1
    numbers = (numbers ^ (numbers >> np.uint64(27))) * _MIX_2
    return numbers ^ (numbers >> np.uint64(31))


@dataclass
class TensorHashSum:
    """Hash of the rows of one tensor that were read so far.

    Attributes:
        layout: of the whole tensor.
        spans: disjoint and sorted.
        lock: of all, as threads read different rows.
    """

    layout: RowLayout
    spans: list[Span] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)
    _mixed: int = 0
    # digests of the blocks of consecutive rows, by the number of the first row: mixed in together
    _pending: list[tuple[int, list[int]]] = field(default_factory=list)

    @property
    def total(self) -> int:
        """The sum of the hashes of the rows in ``spans``."""
        with self.lock:
            for first, blocks in self._pending:
                digests = np.array(blocks, np.uint64).repeat(self.layout.block_rows)
                part = _sum_row_hashes(digests[: self.layout.rows - first], first)
                self._mixed = (self._mixed + part) & _MASK
            self._pending.clear()
            return self._mixed

    def add_blocks(self, first: int, blocks: list[int]) -> None:
        """Add whole blocks by their digests; the lock is held, and the rows are marked already.

        Args:
            first: number of the first row of the first block.
        """
        if self._pending:
            start, known = self._pending[-1]
            if start + len(known) * self.layout.block_rows == first:
                known.extend(blocks)
                return
        self._pending.append((first, blocks))

    def add_rows(self, first: int, digests: NDArray[np.uint64]) -> None:
        """Add rows by the digest of each one's block; the lock is held.

        Args:
            first: number of the first row.
        """
        self._mixed = (self._mixed + _sum_row_hashes(digests, first)) & _MASK

    def list_missing_spans(self, span: Span) -> list[Span]:
        """Return the parts of ``span`` that were not hashed yet."""
        gaps, start = [], span.start
        for known in self.spans:
            if known.stop <= start:
                continue
            if known.start >= span.stop:
                break
            if known.start > start:
                gaps.append(Span(start, known.start))
            start = known.stop
        if start < span.stop:
            gaps.append(Span(start, span.stop))
        return gaps

    def mark_hashed(self, span: Span) -> None:
        if self.spans and self.spans[-1].stop == span.start:  # the usual case
            self.spans[-1] = Span(self.spans[-1].start, span.stop)
            return
        joined: list[Span] = []
        for known in sorted([*self.spans, span], key=lambda s: s.start):
            if joined and known.start <= joined[-1].stop:
                joined[-1] = Span(joined[-1].start, max(joined[-1].stop, known.stop))
            else:
                joined.append(known)
        self.spans = joined

    @property
    def is_complete(self) -> bool:
        return not self.list_missing_spans(Span(0, self.layout.rows))

    @property
    def num_hashed_rows(self) -> int:
        """Number of rows in ``spans``."""
        return sum(map(len, self.spans))


class RowsBeingRead:
    """Rows of one tensor that a reader is filling in, hashed as far as they are read.

    Args:
        known: of the tensor; gets the rows at ``finish_hashing``, so that a read that fails adds
            nothing.
        first: number of the first row.
        data: contiguous ``uint8`` on the CPU, whole rows, at least one.
        read_block: for the rest of blocks of which ``data`` has a part; None: it has none such.
    """

    def __init__(
        self,
        known: TensorHashSum,
        first: int,
        data: Tensor,
        read_block: BlockReader | None = None,
    ) -> None:
        self._known, self._layout, self._read_block = known, known.layout, read_block
        self._memory = data.numpy().reshape(-1).data
        self._rows = Span(first, first + len(self._memory) // self._layout.row_bytes)
        # a row number, of the first block that begins in data
        self._begun = self._done = first + -first % self._layout.block_rows
        self._digests = array("Q")

    def list_panels(self) -> Iterator[Span]:
        """Yield byte ranges of ``data``, in order: read one, then call ``hash_up_to`` its end."""
        first, size, start = self._rows.start, self._layout.row_bytes, 0
        for end in self._layout.list_panel_ends(self._rows):
            stop = (end - first) * size
            yield Span(start, stop)
            start = stop

    def hash_up_to(self, num_bytes: int) -> None:
        """Hash the blocks that lie in the first ``num_bytes`` of ``data``, as read so far."""
        layout, size, first = self._layout, self._layout.row_bytes, self._rows.start
        stop = first + num_bytes // size
        stop -= 0 if stop == layout.rows else stop % layout.block_rows
        memory, step, end = self._memory, layout.block_rows * size, (stop - first) * size
        for begin in range((self._done - first) * size, end, step):
            self._digests.append(_digest(memory[begin : min(begin + step, end)]))
        self._done = max(self._done, stop)

    def finish_hashing(self) -> None:
        """Add the rows to the tensor, after all of them were read; rows added before count once.

        Raises:
            UserError, OSError: of ``read_block``.
        """
        rows, layout = self._rows, self._layout
        assert self._done > rows.stop - layout.block_rows
        blocks = [*self._digests]
        if rows.start < self._begun:
            blocks.insert(0, self._hash_shared_block(rows.start))
        if self._begun <= self._done < rows.stop:
            blocks.append(self._hash_shared_block(self._done))
        known, aligned = self._known, rows.start == self._begun and rows.stop == self._done
        with known.lock:
            gaps = known.list_missing_spans(rows)
            if aligned and gaps == [rows]:
                known.add_blocks(rows.start, blocks)
            elif gaps:
                digests = np.array(blocks, np.uint64).repeat(layout.block_rows)
                digests = digests[rows.start % layout.block_rows :]
                for gap in gaps:
                    known.add_rows(gap.start, digests[gap.shifted_by(-rows.start).slice])
            for gap in gaps:
                known.mark_hashed(gap)

    def _hash_shared_block(self, row: int) -> int:
        assert self._read_block is not None
        return _digest(self._read_block(self._layout.block_of_row(row)))


class RowHashes:
    """Hashes of the rows that one process reads through a ``RowReader``.

    A row that is read again is not hashed again.

    Args:
        plain: the tensors to hash as the files have them.
        packed: the weights that the files have in several tensors, of which no range belongs to a
            range of rows. They are hashed in the rows of the codec, which depend on the rows alone
            (``add_packed_rows``). The tensors they are made of are in neither.

    Attributes:
        sums: by name, of tensors that were read at least in part.
    """

    def __init__(self, plain: Iterable[TensorSpec], packed: Iterable[TensorSpec] = ()) -> None:
        self._plain = {spec.name: spec for spec in plain}
        self._packed = {spec.name: spec for spec in packed}
        self._layouts = {spec.name: RowLayout.of_tensor(spec) for spec in self._plain.values()}
        self.sums: dict[str, TensorHashSum] = {}

    @property
    def tensor_names(self) -> list[str]:
        """Names of all tensors that can be hashed, sorted."""
        return sorted([*self._plain, *self._packed])

    def count_rows(self, name: str) -> int:
        """Return how many rows a tensor that can be hashed has."""
        packed = self._packed.get(name)
        return self._layouts[name].rows if packed is None else packed.num_rows

    def begin_hashing(
        self, name: str, first: int, data: Tensor, read_block: BlockReader
    ) -> RowsBeingRead | None:
        """Hash rows of a tensor, as bytes of its file, while they are read.

        Args:
            first: number of the first row.
            data: contiguous ``uint8``, whole rows, yet to be read.
            read_block: of this tensor.

        Returns:
            None where there is nothing to do: the tensor is not hashed, or these rows were.
        """
        return None if name not in self._plain else self._begin_rows(name, first, data, read_block)

    def add_packed_rows(self, name: str, first: int, packed: Tensor) -> None:
        """Hash packed rows ``uint8 [n, row_bytes]`` of a weight stored as several tensors."""
        if name not in self._packed:
            return
        self._layouts.setdefault(name, RowLayout(self._packed[name].num_rows, packed.shape[1]))
        data = packed.cpu().contiguous()
        if (rows := self._begin_rows(name, first, data)) is not None:
            rows.hash_up_to(data.numel())
            rows.finish_hashing()

    def _begin_rows(
        self, name: str, first: int, data: Tensor, read_block: BlockReader | None = None
    ) -> RowsBeingRead | None:
        if not data.numel():
            return None
        layout = self._layouts[name]
        known = self.sums.setdefault(name, TensorHashSum(layout))
        with known.lock:
            missing = known.list_missing_spans(
                Span(first, first + data.numel() // layout.row_bytes)
            )
        if not missing:
            return None
        return RowsBeingRead(known, first, data, read_block)

    def describe_tensor(self, name: str, total: int) -> str:
        """Return the hash of a whole tensor, its type and shape included: the number of the kind of
        hash, a colon and 16 hexadecimal digits."""
        spec = self._packed.get(name) or self._plain[name]
        header = xxhash.xxh3_64_intdigest(f"{spec.dtype} {list(spec.shape)}".encode())
        return tag_hash(f"{(total + header) & _MASK:016x}")
