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
from functools import partial
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from dist_peft.core.span import Span
from dist_peft.store.content import RowHashes, RowLayout, RowsBeingRead
from dist_peft.store.fileio import OpenFiles, read_exactly, translate_read_errors
from dist_peft.store.format import TensorInfo
from dist_peft.store.index import SafetensorsIndex

__all__ = ["RowReader"]


class RowReader:
    """Reader of rows of an index's tensors; a context manager that closes its files.

    Attributes:
        index: where the tensors are.
        bytes_read: bytes of all ``read`` calls so far.
        largest_read: bytes of the largest one.
        bytes_read_again: bytes, next to the rows asked for or of them, that were read for hashes
            alone (``store.content``).
        hashes: gets all whole rows that are read; None: nothing is hashed.
    """

    def __init__(self, index: SafetensorsIndex, hashes: RowHashes | None = None) -> None:
        self.index, self.hashes = index, hashes
        self.bytes_read = 0
        self.largest_read = 0
        self.bytes_read_again = 0
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
        first = span.start * (RowLayout.of_tensor(info).rows // max(1, info.num_rows))
        data = self._read_pieces(info, pieces, first if whole else None)
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
        data = self._read_pieces(info, pieces, span.start if len(info.shape) > 1 else None)
        return data.view(info.dtype).reshape(len(span), info.shape[-1])

    def _read_pieces(
        self, info: TensorInfo, pieces: list[tuple[int, int]], first: int | None
    ) -> Tensor:
        """Read pieces (offset, length) of a tensor's file into one ``uint8`` tensor.

        Args:
            first: of one piece that is whole rows: the number of the first one, for hashes.
        """
        data = torch.empty(sum(length for _, length in pieces), dtype=torch.uint8)
        if data.numel():
            memory, done = data.numpy().data, 0
            rows: RowsBeingRead | None = None
            if self.hashes is not None and first is not None:
                read_block = partial(self._read_block, info)
                rows = self.hashes.begin_hashing(info.name, first, data, read_block)
                if rows is not None:
                    begin = pieces[0][0]
                    pieces = [(begin + part.start, len(part)) for part in rows.list_panels()]
            with translate_read_errors(info.file):
                descriptor = self._files.get_descriptor(info.file)
                for offset, length in pieces:
                    read_exactly(descriptor, memory[done : done + length], offset, info.file)
                    done += length
                    if rows is not None:
                        rows.hash_up_to(done)
                if rows is not None:
                    rows.finish_hashing()
        self.bytes_read += data.numel()
        self.largest_read = max(self.largest_read, data.numel())
        return data

    def _read_block(self, info: TensorInfo, rows: Span) -> memoryview:
        """Read rows (of the last dimension) for their hash alone."""
        size = RowLayout.of_tensor(info).row_bytes
        memory = memoryview(bytearray(len(rows) * size))
        descriptor = self._files.get_descriptor(info.file)
        read_exactly(descriptor, memory, info.start + rows.start * size, info.file)
        self.bytes_read_again += len(memory)
        return memory
