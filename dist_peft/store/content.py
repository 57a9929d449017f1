"""Hashes of a base's tensors, computed row by row while the rows are read for another purpose.

Every row is hashed with its number, and a tensor's hash is the sum of its rows' hashes::

    h(tensor) = sum over rows i of  h(i, bytes of row i)     mod 2^64

A sum does not depend on the order, so that it is the same however rows are distributed over ranks
and cut into chunks; the ranks add their sums up. A row is the last dimension: of a stack of experts
``[E, out, in]`` every expert has ``out`` rows; of a vector a row is an element. Rows of at least
``_SHORT`` bytes are hashed with XXH3, of shorter ones every 8 bytes stand for themselves; either is
mixed with its position by the finalizer of SplitMix64 (Steele, Lea, Flood 2014), for all at once.
Every byte counts, and one that changes always changes the sum where rows are short; of a longer row
XXH3 misses a change with a chance of 2^-64.

Where the time of it goes (``benchmarks/hash_cost.py``): XXH3 needs the rows in the processor's
cache, so they are hashed panel by panel between the reads of a file (``RowsBeingRead``); arithmetic
on arrays costs by the call at that size, so positions are mixed in once a read, not once a panel.

This finds other weights, damaged files and mistaken directories; it is no protection against an
adversary, who can construct another base of the same hash.
"""

from array import array
from collections.abc import Callable, Iterable
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
    "RowHashes",
    "RowsBeingRead",
    "TensorHashSum",
    "flat_row_layout",
    "hash_rows",
    "to_signed_int64",
]

_SHORT = 96
"""Bytes; below it one call per row costs more than arithmetic on arrays."""

_WORDS_AT_ONCE = 1 << 18

_digest: Callable[[Any], int] = xxhash.xxh3_64_intdigest

_MASK = (1 << 64) - 1
_GOLDEN, _MIX_1, _MIX_2 = (
    np.uint64(number) for number in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


def to_signed_int64(value: int) -> int:
    """Reinterpret an unsigned 64-bit hash as int64, whose sums wrap modulo 2^64."""
    return value - 2**64 if value >= 2**63 else value


def flat_row_layout(spec: TensorSpec) -> tuple[int, int]:
    """Return number of rows (see the module) of a tensor, and bytes of each."""
    if len(spec.shape) < 2:
        return spec.num_rows, spec.dtype.itemsize
    row_bytes = spec.shape[-1] * spec.dtype.itemsize
    return torch.Size(spec.shape[:-1]).numel(), row_bytes


def hash_rows(data: Tensor, first: int, row_bytes: int) -> int:
    """Return the sum of the hashes of rows that lie behind each other.

    Args:
        data: contiguous ``uint8`` on the CPU, a multiple of ``row_bytes`` long.
        first: the number of the first row.
        row_bytes: at least 1.

    Returns:
        Below 2^64. ``hash_rows`` of two parts of ``data`` add up to that of the whole.
    """
    if not data.numel():
        return 0
    array: NDArray[np.uint8] = data.numpy().reshape(-1)
    if row_bytes < _SHORT:
        return _hash_short_rows(array, first, row_bytes)
    return _sum_row_digests(_hash_each_row(array, row_bytes), first)


def _hash_each_row(array: NDArray[np.uint8], row_bytes: int) -> NDArray[np.uint64]:
    rows = len(array) // row_bytes
    return np.fromiter(map(_digest, array.reshape(rows, row_bytes)), np.uint64, rows)


def _sum_row_digests(digests: NDArray[np.uint64], first: int) -> int:
    places = np.arange(first + 1, first + 1 + len(digests), dtype=np.uint64)
    total = _mix_bits(digests ^ _mix_bits(places * _GOLDEN)).sum(dtype=np.uint64)
    return int(total) & _MASK


def _hash_short_rows(array: NDArray[np.uint8], first: int, row_bytes: int) -> int:
    rows, words = len(array) // row_bytes, -(-row_bytes // 8)
    total, step = 0, max(1, _WORDS_AT_ONCE // words)
    for start in range(0, rows, step):
        part = array[start * row_bytes : (start + step) * row_bytes].reshape(-1, row_bytes)
        padded = np.zeros((len(part), 8 * words), np.uint8)
        padded[:, :row_bytes] = part
        begin = (first + start) * words
        places = np.arange(begin + 1, begin + 1 + padded.size // 8, dtype=np.uint64)
        numbers = padded.reshape(-1).view("<u8") ^ _mix_bits(places * _GOLDEN)
        total += int(_mix_bits(numbers).sum(dtype=np.uint64))
    return total & _MASK


def _mix_bits(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finalizer, a permutation of the numbers below 2^64."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * _MIX_1
    numbers = (numbers ^ (numbers >> np.uint64(27))) * _MIX_2
    return numbers ^ (numbers >> np.uint64(31))


@dataclass
class TensorHashSum:
    """Hash of the rows of one tensor that were read so far.

    Attributes:
        rows: of the whole tensor.
        total: the sum of the hashes of the rows in ``spans``.
        spans: disjoint and sorted.
    """

    rows: int
    total: int = 0
    spans: list[Span] = field(default_factory=list)

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
        joined: list[Span] = []
        for known in sorted([*self.spans, span], key=lambda s: s.start):
            if joined and known.start <= joined[-1].stop:
                joined[-1] = Span(joined[-1].start, max(joined[-1].stop, known.stop))
            else:
                joined.append(known)
        self.spans = joined

    @property
    def is_complete(self) -> bool:
        return not self.list_missing_spans(Span(0, self.rows))

    @property
    def num_hashed_rows(self) -> int:
        """Number of rows in ``spans``."""
        return sum(map(len, self.spans))


class RowsBeingRead:
    """Rows of one tensor that a reader is filling in, hashed as far as they are read.

    Args:
        known: of the tensor; gets the rows at ``finish``, so that a read that fails adds nothing.
        first: number of the first row.
        data: contiguous ``uint8`` on the CPU, whole rows, at least one.
        row_bytes: of each.
    """

    def __init__(self, known: TensorHashSum, first: int, data: Tensor, row_bytes: int) -> None:
        self._known, self._first, self._row_bytes = known, first, row_bytes
        self._array: NDArray[np.uint8] = data.numpy().reshape(-1)
        self._done = 0
        self._rows = None if row_bytes < _SHORT else self._array.reshape(-1, row_bytes)
        self._digests = array("Q")  # extended in C: cheaper for a panel than an array of numpy's

    def hash_up_to(self, num_bytes: int) -> None:
        """Hash ``data`` up to byte ``num_bytes``, a multiple of ``row_bytes``, as read so far."""
        if self._rows is not None:
            fresh = self._rows[len(self._digests) : num_bytes // self._row_bytes]
            self._digests.extend(map(_digest, fresh))
        self._done = num_bytes

    def finish_hashing(self) -> None:
        """Hash the rest of ``data`` and add it to the tensor; rows added before count once."""
        assert self._done == len(self._array)
        rows = Span(self._first, self._first + len(self._array) // self._row_bytes)
        digests = np.frombuffer(self._digests, np.uint64) if self._digests else None
        for gap in self._known.list_missing_spans(rows):
            own = gap.shifted_by(-self._first)
            if digests is not None:
                part = _sum_row_digests(digests[own.slice], gap.start)
            else:
                short = self._array[own.start * self._row_bytes : own.stop * self._row_bytes]
                part = _hash_short_rows(short, gap.start, self._row_bytes)
            self._known.total = (self._known.total + part) & _MASK
            self._known.mark_hashed(gap)


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
        self.sums: dict[str, TensorHashSum] = {}

    @property
    def tensor_names(self) -> list[str]:
        """Names of all tensors that can be hashed, sorted."""
        return sorted([*self._plain, *self._packed])

    def num_hashed_rows(self, name: str) -> int:
        """Return the number of rows of the tensor hashed so far."""
        return (
            self._packed[name].num_rows
            if name in self._packed
            else flat_row_layout(self._plain[name])[0]
        )

    def begin_hashing(self, name: str, first: int, data: Tensor) -> RowsBeingRead | None:
        """Hash rows of a tensor, as bytes of its file, while they are read.

        Args:
            first: number of the first row.
            data: contiguous ``uint8``, whole rows, yet to be read.

        Returns:
            None where there is nothing to do: the tensor is not hashed, or these rows were.
        """
        spec = self._plain.get(name)
        return (
            None
            if spec is None
            else self._begin_hashing_rows(name, first, data, flat_row_layout(spec)[1])
        )

    def add_plain_rows(self, name: str, first: int, data: Tensor) -> None:
        """Hash rows of a tensor that have been read; see ``begin_hashing``."""
        self._add_finished_rows(self.begin_hashing(name, first, data), data)

    def add_packed_rows(self, name: str, first: int, packed: Tensor) -> None:
        """Hash packed rows ``uint8 [n, row_bytes]`` of a weight stored as several tensors."""
        if name in self._packed:
            data = packed.cpu().contiguous()
            self._add_finished_rows(
                self._begin_hashing_rows(name, first, data, packed.shape[1]), data
            )

    def _begin_hashing_rows(
        self, name: str, first: int, data: Tensor, row_bytes: int
    ) -> RowsBeingRead | None:
        if not data.numel():
            return None
        known = self.sums.setdefault(name, TensorHashSum(self.num_hashed_rows(name)))
        if not known.list_missing_spans(Span(first, first + data.numel() // row_bytes)):
            return None
        return RowsBeingRead(known, first, data, row_bytes)

    @staticmethod
    def _add_finished_rows(rows: RowsBeingRead | None, data: Tensor) -> None:
        if rows is not None:
            rows.hash_up_to(data.numel())
            rows.finish_hashing()

    def describe_tensor(self, name: str, total: int) -> str:
        """Return the hash of a whole tensor, its type and shape included: 16 hexadecimal digits."""
        spec = self._packed.get(name) or self._plain[name]
        header = xxhash.xxh3_64_intdigest(f"{spec.dtype} {list(spec.shape)}".encode())
        return f"{(total + header) & _MASK:016x}"
