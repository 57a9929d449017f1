"""Reading rows of tensors: exactly the bytes asked for, into memory of the tensor itself.

A row range of a row-major tensor is one contiguous byte range of its file::

    file:   | header | ... tensor [rows, ...] ....................... |
                           ^ start        [ row a .. row b )
                                          ^ start + a * row_bytes

so that a rank which keeps rows ``[a, b)`` reads ``(b - a) * row_bytes`` bytes and no page of the
other ranks' rows becomes its memory. The counters let tests and run reports prove it.

Some formats keep a weight transposed; there a rank's part is a range of columns, one piece of each
row, and these pieces alone are read.
"""

import os
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from dist_peft.core.span import Span
from dist_peft.store.content import RowHashes, RowsBeingRead, flat_row_layout
from dist_peft.store.fileio import OpenFiles, read_exactly, translate_read_errors
from dist_peft.store.index import SafetensorsIndex

__all__ = ["RowReader"]

_PANEL_BYTES = 1 << 19
"""Read before it is hashed: it should still be in the processor's cache then."""


class RowReader:
    """Reader of rows of an index's tensors; a context manager that closes its files.

    Attributes:
        index: where the tensors are.
        bytes_read: bytes of all ``read`` calls so far.
        largest_read: bytes of the largest one.
        hashes: gets all whole rows that are read; None: nothing is hashed.
    """

    def __init__(self, index: SafetensorsIndex, hashes: RowHashes | None = None) -> None:
        self.index, self.hashes = index, hashes
        self.bytes_read = 0
        self.largest_read = 0
        self._files = OpenFiles(os.O_RDONLY)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._files.close()

    def read_rows(self, name: str, span: Span | None = None, columns: Span | None = None) -> Tensor:
        """Read rows ``span`` of a tensor (default: all) into a new CPU tensor.

        Args:
            name: the tensor.
            span: rows of dimension 0; of a vector, elements. A 0-d tensor has one row, and its only
                span returns it with shape ``()``.
            columns: of a matrix, the columns wanted (all of them by default); a system call a row.

        Returns:
            ``[len(span), *shape[1:]]`` in the file's type; ``[len(span), len(columns)]``.

        Raises:
            UserError: unknown name, or the file is gone, unreadable or shorter than it was.
            ValueError: the span leaves the tensor, or columns of a tensor that is not a matrix.
        """
        info = self.index.find_tensor(name)
        if span is None:
            span = Span(0, info.num_rows)
        if span.stop > info.num_rows or (not info.shape and not len(span)):
            raise ValueError(f"tensor {name} of shape {info.shape} has no {span}")
        shape = (len(span), *info.shape[1:]) if info.shape else ()
        if columns is not None and (len(info.shape) != 2 or columns.stop > info.shape[1]):
            raise ValueError(f"tensor {name} of shape {info.shape} has no columns {columns}")
        whole = columns is None or len(columns) == info.shape[1]
        if columns is None or whole:
            pieces = [(info.start + span.start * info.row_bytes, len(span) * info.row_bytes)]
        else:
            shape, size = (len(span), len(columns)), info.dtype.itemsize
            begin = info.start + columns.start * size
            pieces = [
                (begin + row * info.row_bytes, len(columns) * size)
                for row in range(span.start, span.stop)
            ]
        rows, row_bytes = flat_row_layout(info)
        first = span.start * (rows // max(1, info.num_rows))
        data = self._read_pieces(info.file, pieces, (name, first, row_bytes) if whole else None)
        return data.view(info.dtype).reshape(shape)

    def read_flat_rows(self, name: str, span: Span) -> Tensor:
        """Read rows ``span`` of a tensor ``[..., n]`` taken as one matrix of all its rows of ``n``.

        Returns:
            ``[len(span), n]`` in the file's type.

        Raises:
            UserError: as for ``read``.
            ValueError: the span leaves the tensor.
        """
        info = self.index.find_tensor(name)
        row = info.shape[-1] * info.dtype.itemsize
        if span.stop * row > info.num_bytes:
            raise ValueError(f"tensor {name} of shape {info.shape} has no flat {span}")
        pieces = [(info.start + span.start * row, len(span) * row)]
        hashed = (name, span.start, row) if len(info.shape) > 1 else None
        data = self._read_pieces(info.file, pieces, hashed)
        return data.view(info.dtype).reshape(len(span), info.shape[-1])

    def _read_pieces(
        self, file: Path, pieces: list[tuple[int, int]], hashed: tuple[str, int, int] | None
    ) -> Tensor:
        """Read pieces (offset, length) of a file into one ``uint8`` tensor.

        Args:
            hashed: of one piece that is whole rows: name, number of the first row, bytes of a row.
        """
        data = torch.empty(sum(length for _, length in pieces), dtype=torch.uint8)
        if data.numel():
            memory, done = data.numpy().data, 0
            rows: RowsBeingRead | None = None
            if self.hashes is not None and hashed is not None:
                name, first, row_bytes = hashed
                rows = self.hashes.begin_hashing(name, first, data)
                if rows is not None:
                    pieces = _split_into_panels(*pieces[0], row_bytes)
            with translate_read_errors(file):
                descriptor = self._files.get_descriptor(file)
                for offset, length in pieces:
                    read_exactly(descriptor, memory[done : done + length], offset, file)
                    done += length
                    if rows is not None:
                        rows.hash_up_to(done)
            if rows is not None:
                rows.finish_hashing()
        self.bytes_read += data.numel()
        self.largest_read = max(self.largest_read, data.numel())
        return data


def _split_into_panels(offset: int, length: int, row_bytes: int) -> list[tuple[int, int]]:
    """Cut one piece into panels of about ``_PANEL_BYTES`` each, in whole rows."""
    step = max(1, _PANEL_BYTES // row_bytes) * row_bytes
    return [(offset + done, min(step, length - done)) for done in range(0, length, step)]
