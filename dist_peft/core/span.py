"""Row ranges of sharded tensors. Pure integers, no tensors, no processes.

A *span* is a half-open range ``[start, stop)`` of rows (dimension 0). Every engine shards along
rows only, so that a shard is one contiguous byte range of a row-major file, and every codec is
row-local, so that a rank can encode its own rows without seeing another's.

``row_span`` is the rule of ``torch.chunk``, which FSDP2 uses for ``Shard(0)``: each part takes
``ceil(n / parts)`` rows until they run out, so the last parts may be short or empty::

    n = 10, parts = 4   ->   [0,3) [3,6) [6,9) [9,10)
    n =  5, parts = 4   ->   [0,2) [2,4) [4,5) [5,5)
"""

from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["Span", "row_span"]


@dataclass(frozen=True)
class Span:
    """A half-open range of rows, ``0 <= start <= stop``."""

    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop:
            raise ValueError(f"not a span: [{self.start}, {self.stop})")

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def slice(self) -> slice:
        return slice(self.start, self.stop)

    def intersect(self, other: "Span") -> "Span":
        """Return the rows in both; if there are none, an empty span inside ``self``'s bounds."""
        start = min(max(self.start, other.start), self.stop)
        return Span(start, max(start, min(self.stop, other.stop)))

    def shifted_by(self, offset: int) -> "Span":
        return Span(self.start + offset, self.stop + offset)

    def split_into_chunks(self, rows: int) -> Iterator["Span"]:
        """Cut into consecutive spans of at most ``rows`` rows."""
        if rows < 1:
            raise ValueError(f"a chunk has at least one row, not {rows}")
        for start in range(self.start, self.stop, rows):
            yield Span(start, min(start + rows, self.stop))


def row_span(num_rows: int, parts: int, index: int) -> Span:
    """Return the rows of part ``index`` of ``parts``, by the rule of ``torch.chunk`` (see the
    module)."""
    if not 0 <= index < parts:
        raise ValueError(f"part {index} of {parts} does not exist")
    size = -(-num_rows // parts)
    return Span(min(index * size, num_rows), min((index + 1) * size, num_rows))
