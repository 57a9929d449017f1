"""A reader for tensors whose columns are read part by part: each is read once and kept."""

from torch import Tensor

from dist_peft.core.span import Span
from dist_peft.store.reader import RowReader

__all__ = ["HoldingReader"]


class HoldingReader(RowReader):
    """Keeps the matrices of which a part of the columns is read, so that reading all columns in
    turn is one pass over the file. Its memory is theirs: use one for each weight.

    Args:
        reader: reads and counts; not closed with this one.
    """

    def __init__(self, reader: RowReader) -> None:
        super().__init__(reader.index, reader.hashes)
        self._reader = reader
        self._kept: dict[str, Tensor] = {}
        self._kept_flat: tuple[tuple[str, Span], Tensor] | None = None

    def read_rows(self, name: str, span: Span | None = None, columns: Span | None = None) -> Tensor:
        """Return rows as ``RowReader`` does; a part of the columns as a view of the kept tensor."""
        shape = self.index.find_tensor(name).shape
        partial = columns is not None and len(shape) == 2 and len(columns) < shape[1]
        if columns is None or not partial or columns.stop > shape[1]:
            return self._reader.read_rows(name, span, columns)
        if name not in self._kept:
            self._kept[name] = self._reader.read_rows(name)
        rows = slice(None) if span is None else span.slice
        return self._kept[name][rows, columns.slice]

    def read_flat_rows(self, name: str, span: Span, columns: Span | None = None) -> Tensor:
        """Return rows as ``RowReader`` does; of a part of the columns, those rows are kept until
        others are asked for."""
        width = self.index.find_tensor(name).shape[-1]
        if columns is None or len(columns) == width or columns.stop > width:
            return self._reader.read_flat_rows(name, span, columns)
        key = (name, span)
        if self._kept_flat is None or self._kept_flat[0] != key:
            self._kept_flat = None  # first: its memory is used again
            self._kept_flat = key, self._reader.read_flat_rows(name, span)
        return self._kept_flat[1][:, columns.slice]
