"""Reading rows of tensors: exactly the bytes asked for, into memory of the tensor itself.

A row range of a row-major tensor is one contiguous byte range of its file::

    file:   | header | ... tensor [rows, ...] ....................... |
                           ^ start        [ row a .. row b )
                                          ^ start + a * row_bytes

so that a rank which keeps rows ``[a, b)`` reads ``(b - a) * row_bytes`` bytes and no page of the
other ranks' rows becomes its memory. The counters let tests and run reports prove it.

Some formats keep a weight transposed; there a rank's part is a range of columns, one piece of each
row. Large pieces alone are read. Small ones are read with the bytes between them, which are
dropped at once: a system call for each of the 800,000 pieces of a 70B on 8 ranks costs more, on
network file systems by far, than bytes of pages that are read anyway.
"""

import os
import threading
from functools import partial

import torch
from torch import Tensor

from dist_peft.core.closing import ClosedAtExit
from dist_peft.core.span import Span
from dist_peft.store.content import RowHashes, RowLayout, RowsBeingRead
from dist_peft.store.fileio import (
    OpenFiles,
    read_exactly,
    read_strided,
    translate_read_errors,
)
from dist_peft.store.format import TensorInfo
from dist_peft.store.index import SafetensorsIndex

__all__ = ["RowReader"]

_SMALL_PIECE = 1 << 16
"""Bytes below which the gaps between pieces are read too."""


class RowReader(ClosedAtExit):
    """Reader of rows of an index's tensors; a context manager that closes its files.

    Attributes:
        index: where the tensors are.
        bytes_read: bytes of all ``read`` calls so far.
        largest_read: bytes of the largest one.
        bytes_skipped: bytes between small pieces of rows, which were read and dropped.
        bytes_read_again: bytes, next to the rows asked for or of them, that were read for hashes
            alone (``store.content``).
        hashes: gets all whole rows that are read; None: nothing is hashed.
    """

    def __init__(self, index: SafetensorsIndex, hashes: RowHashes | None = None) -> None:
        self.index, self.hashes = index, hashes
        self.bytes_read = 0
        self.largest_read = 0
        self.bytes_skipped = 0
        self.bytes_read_again = 0
        self._lock = threading.Lock()  # of the counters
        self._files = OpenFiles(os.O_RDONLY)

    def close(self) -> None:
        self._files.close()

    def read_rows(self, name: str, span: Span | None = None, columns: Span | None = None) -> Tensor:
        """Read rows ``span`` of a tensor (default: all) into a new CPU tensor.

        Args:
            name: the tensor.
            span: rows of dimension 0; of a vector, elements. A 0-d tensor has one row, and its only
                span returns it with shape ``()``.
            columns: of a matrix, the columns wanted (all of them by default).

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
        if columns is not None and len(columns) < info.shape[1]:
            return self._read_columns(info, span, columns)
        begin = info.start + span.start * info.row_bytes
        first = span.start * (RowLayout.of_tensor(info).rows // max(1, info.num_rows))
        data = self._read_range(info, begin, len(span) * info.row_bytes, first)
        return data.view(info.dtype).reshape(shape)

    def read_flat_rows(self, name: str, span: Span, columns: Span | None = None) -> Tensor:
        """Read rows ``span`` of a tensor ``[..., n]`` taken as one matrix of all its rows of ``n``.

        Args:
            columns: those wanted; all by default.

        Returns:
            ``[len(span), n]`` in the file's type; ``[len(span), len(columns)]``.

        Raises:
            UserError: as for ``read``.
            ValueError: the span leaves the tensor.
        """
        info = self.index.find_tensor(name)
        row = info.shape[-1] * info.dtype.itemsize
        if span.stop * row > info.num_bytes:
            raise ValueError(f"tensor {name} of shape {info.shape} has no flat {span}")
        if columns is not None and columns.stop > info.shape[-1]:
            raise ValueError(f"tensor {name} of shape {info.shape} has no columns {columns}")
        if columns is not None and len(columns) < info.shape[-1]:
            return self._read_columns(info, span, columns)
        first = span.start if len(info.shape) > 1 else None
        data = self._read_range(info, info.start + span.start * row, len(span) * row, first)
        return data.view(info.dtype).reshape(len(span), info.shape[-1])

    def _read_range(self, info: TensorInfo, begin: int, length: int, first: int | None) -> Tensor:
        """Read ``length`` bytes at ``begin`` of a tensor's file into one ``uint8`` tensor.

        Args:
            first: of whole rows: the number of the first one, for hashes.
        """
        data = torch.empty(length, dtype=torch.uint8)
        if length:
            memory, parts = data.numpy().data, [Span(0, length)]
            rows: RowsBeingRead | None = None
            if self.hashes is not None and first is not None:
                read_block = partial(self._read_block, info)
                rows = self.hashes.begin_hashing(info.name, first, data, read_block)
                if rows is not None:
                    parts = [*rows.list_panels()]
            with (
                translate_read_errors(info.file),
                self._files.hold_descriptor(info.file) as descriptor,
            ):
                for part in parts:
                    read_exactly(descriptor, memory[part.slice], begin + part.start, info.file)
                    if rows is not None:
                        rows.hash_up_to(part.stop)
                if rows is not None:
                    rows.finish_hashing()
        self._count_bytes(length)
        return data

    def _read_columns(self, info: TensorInfo, span: Span, columns: Span) -> Tensor:
        """Read a part of some rows of the last dimension, none of them whole."""
        size = info.dtype.itemsize
        stride = info.shape[-1] * size
        piece = len(columns) * size
        data = torch.empty(len(span) * piece, dtype=torch.uint8)
        if data.numel():
            memory = data.numpy().data
            begin = info.start + span.start * stride + columns.start * size
            with (
                translate_read_errors(info.file),
                self._files.hold_descriptor(info.file) as descriptor,
            ):
                if piece < _SMALL_PIECE:
                    read_strided(descriptor, memory, begin, piece, stride, info.file)
                    skipped = (len(span) - 1) * (stride - piece)
                else:
                    skipped = 0
                    for row in range(len(span)):
                        part = memory[row * piece : (row + 1) * piece]
                        read_exactly(descriptor, part, begin + row * stride, info.file)
            self._count_bytes(data.numel(), skipped)
        return data.view(info.dtype).reshape(len(span), len(columns))

    def _count_bytes(self, read: int, skipped: int = 0, again: int = 0) -> None:
        with self._lock:
            self.bytes_read += read
            self.largest_read = max(self.largest_read, read)
            self.bytes_skipped += skipped
            self.bytes_read_again += again

    def _read_block(self, info: TensorInfo, rows: Span) -> memoryview:
        """Read rows (of the last dimension) for their hash alone."""
        size = RowLayout.of_tensor(info).row_bytes
        memory = memoryview(bytearray(len(rows) * size))
        with self._files.hold_descriptor(info.file) as descriptor:
            read_exactly(descriptor, memory, info.start + rows.start * size, info.file)
        self._count_bytes(0, again=len(memory))
        return memory
