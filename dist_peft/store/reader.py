"""Reading rows of tensors: exactly the bytes asked for, into memory of the tensor itself.

A row range of a row-major tensor is one contiguous byte range of its file::

    file:   | header | ... tensor [rows, ...] ....................... |
                           ^ start        [ row a .. row b )
                                          ^ start + a * row_bytes

so that a rank which keeps rows ``[a, b)`` reads ``(b - a) * row_bytes`` bytes and no page of the
other ranks' rows becomes its memory. The counters let tests and run reports prove it.
"""

import os
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from dist_peft.core.span import Span
from dist_peft.store.fileio import OpenFiles, read_exactly, reading
from dist_peft.store.index import SafetensorsIndex

__all__ = ["RowReader"]


class RowReader:
    """Reads rows of an index's tensors; a context manager that closes its files.

    Attributes:
        index: where the tensors are.
        bytes_read: bytes of all ``read`` calls so far.
        largest_read: bytes of the largest one.
    """

    def __init__(self, index: SafetensorsIndex) -> None:
        self.index = index
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

    def read(self, name: str, span: Span | None = None) -> Tensor:
        """Rows ``span`` of a tensor (all of them by default) as a new CPU tensor.

        Args:
            name: the tensor.
            span: rows of dimension 0; of a vector, elements. A 0-d tensor has one row, and its
                only span gives it back with shape ``()``.

        Returns:
            ``[len(span), *shape[1:]]`` in the file's type.

        Raises:
            UserError: unknown name, or the file is gone, unreadable or shorter than it was.
            ValueError: the span leaves the tensor.
        """
        info = self.index.find(name)
        if span is None:
            span = Span(0, info.rows)
        if span.stop > info.rows or (not info.shape and not len(span)):
            raise ValueError(f"tensor {name} of shape {info.shape} has no {span}")
        data = torch.empty(len(span) * info.row_bytes, dtype=torch.uint8)
        if data.numel():
            with reading(info.file):
                offset = info.start + span.start * info.row_bytes
                read_exactly(self._files.get(info.file), data.numpy().data, offset, info.file)
        self.bytes_read += data.numel()
        self.largest_read = max(self.largest_read, data.numel())
        shape = (len(span), *info.shape[1:]) if info.shape else ()
        return data.view(info.dtype).reshape(shape)
