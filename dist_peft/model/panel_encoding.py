"""Read and quantize the rows of a packed weight panel by panel.

A panel's rows are read into memory that the next panel uses again, quantized there while the
processor's cache has them, and only their packed bytes are kept::

    file     | panel 0 | panel 1 | panel 2 | ...       one pass, each panel one read
                  |         |         |
    threads    quantize  quantize  quantize            while one computes, the next one reads
                  v         v         v
    packed   | rows    | rows    | rows    | ...       as a codec is row-local, the same bytes for
                                                       any panels and any number of threads
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from dist_peft.core.span import Span
from dist_peft.model.frozen_linear import FrozenWeight, WeightRows
from dist_peft.quant.packed_rows import CHUNK_ELEMENTS, count_chunk_rows
from dist_peft.store.reader import RowReader

__all__ = ["LOAD_MEMORY", "PanelEncoder", "count_load_threads"]

LOAD_MEMORY = 64 * 2**20
"""Most host memory of the temporaries of all threads of a rank together."""

_COLUMN_MEMORY = 64 * 2**20
"""Most host memory of the panels of transposed weights as read, of all threads together. Their rows
are columns of the files, and a read of some columns passes over the whole matrix: with the panels
of other weights (32 rows of Llama 4's experts) it would be read five hundred times."""

_THREAD_MEMORY = 8 * 4 * CHUNK_ELEMENTS
"""A panel as read, and about seven float32 temporaries of it."""

_DEVICE_THREADS = 2
"""Threads on a GPU: one reads while the other's panel is copied and quantized."""


def count_load_threads(local_ranks: int, device: torch.device) -> int:
    """Return how many threads a rank reads and quantizes with: its share of the processor cores
    that this process may use, within ``LOAD_MEMORY``.

    Args:
        local_ranks: ranks on this node.
        device: on which rows are quantized.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    fitting = LOAD_MEMORY // _THREAD_MEMORY if device.type == "cpu" else _DEVICE_THREADS
    return max(1, min((cores or 1) // max(1, local_ranks), fitting))


class PanelEncoder:
    """Reads and quantizes weights one after the other; a context manager that ends its threads.

    Args:
        reader: of the base's files.
        device: on which rows are quantized.
        threads: that share the panels of a weight out.
    """

    def __init__(self, reader: RowReader, device: torch.device, threads: int = 1) -> None:
        self._reader, self._device, self._threads = reader, device, threads
        self._pool = ThreadPoolExecutor(threads, "load") if threads > 1 else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def encode_rows(self, linear: FrozenWeight, span: Span) -> Tensor:
        """Return packed rows ``uint8 [len(span), row_bytes]`` of a weight.

        Rows that are stored as they are in the files, packed or not quantized, are read at once:
        nothing of them is dropped.

        Raises:
            UserError: damaged files, or values that the codec cannot hold; that of the first such
                panel.
            OSError: the disk failed.
        """
        if linear.stored is not None or not linear.codec.is_quantized or not len(span):
            return self._encode_panel(linear, span)
        row_bytes = linear.codec.num_row_bytes(linear.in_features)
        packed = torch.empty(len(span), row_bytes, dtype=torch.uint8, device=self._device)

        def fill_panel(panel: Span) -> None:
            rows = self._encode_panel(linear, panel)
            packed[panel.shifted_by(-span.start).slice] = rows

        panels = list(_split_into_panels(span, self._count_panel_rows(linear)))
        if self._pool is None or len(panels) == 1:
            for panel in panels:
                fill_panel(panel)
            return packed
        before = torch.get_num_threads()
        torch.set_num_threads(1)  # of each thread's own operations
        try:
            for _ in self._pool.map(fill_panel, panels):
                pass
        finally:
            torch.set_num_threads(before)
        return packed

    def _count_panel_rows(self, linear: FrozenWeight) -> int:
        rows = count_chunk_rows(linear.in_features, self._device)
        if linear.is_transposed:
            width = self._reader.index.find_tensor(linear.stored_name).dtype.itemsize
            rows = max(rows, _COLUMN_MEMORY // self._threads // (linear.in_features * width))
        return rows

    def _encode_panel(self, linear: FrozenWeight, panel: Span) -> Tensor:
        return WeightRows.read_weight_rows(linear, self._reader, panel, self._device).to_packed()


def _split_into_panels(span: Span, most_rows: int) -> Iterator[Span]:
    """Cut into panels that end at multiples of a power of two rows, as the blocks do in which rows
    are hashed (``store.content``), so that no block is in two panels."""
    rows = 1 << most_rows.bit_length() - 1
    start = span.start
    while start < span.stop:
        stop = min(start - start % rows + rows, span.stop)
        yield Span(start, stop)
        start = stop
