"""Along which dimension ``fsdp2`` shards a parameter, decided by bytes.

Rows are the rule: files are read, and rows are quantized, by rows. An all-gather takes equal shares
though, so with ``N`` ranks a matrix of few rows travels, and is whole, with ``N * ceil(rows / N)``
rows. LoRA's ``A`` [r, in] with r = 16 on 512 ranks would be gathered 32 times as large as it is.
Such a matrix is sharded along its columns where ``N`` divides them::

    A [16, 8192], 512 ranks    rows: 512 x 8192 gathered    columns: 16 x 16 a rank, no padding

Only float32 matrices, which are those of adapters: of a parameter sharded by columns each rank is
handed all rows, which for the base would be N times the reading.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dist_peft.core.span import Span, row_span

__all__ = ["ShardPlacement", "choose_shard_placement"]

_MOST_PADDING = 1 / 8
"""Share of the rows that padding may add before columns are sharded instead."""


@dataclass(frozen=True)
class ShardPlacement:
    """How a parameter of ``shape`` lies on ``shards`` ranks: its dimension ``dimension`` is cut by
    ``core.span.row_span`` and padded to equal shares."""

    shape: tuple[int, ...]
    shards: int
    dimension: int

    def local_span(self, index: int) -> Span:
        """Return the range of ``dimension`` that rank ``index`` holds."""
        return row_span(self.shape[self.dimension], self.shards, index)

    def wanted_rows(self, index: int) -> Span:
        """Return the rows that rank ``index`` is handed: its own, or all to be cut to columns."""
        return self.local_span(index) if self.dimension == 0 else Span(0, self.shape[0])

    def cut_columns(self, rows: Tensor, index: int) -> Tensor:
        """Cut the rows of ``wanted_rows`` to the part that rank ``index`` holds."""
        return rows if self.dimension == 0 else rows[:, self.local_span(index).slice]

    def count_local_elements(self, index: int) -> int:
        return self._count_elements(len(self.local_span(index)))

    def count_padded_elements(self) -> int:
        """Return the elements of each rank's share, padding included."""
        return self._count_elements(-(-self.shape[self.dimension] // self.shards))

    def _count_elements(self, size: int) -> int:
        sizes = (size if n == self.dimension else m for n, m in enumerate(self.shape))
        return torch.Size(sizes).numel()


def choose_shard_placement(parameter: Tensor, shards: int) -> ShardPlacement:
    """Return how ``parameter`` (whole in shape, of at least one dimension) is sharded."""
    shape = tuple(parameter.shape)
    padded_rows = -(-shape[0] // shards) * shards
    by_columns = (
        len(shape) == 2
        and parameter.dtype == torch.float32
        and padded_rows - shape[0] > _MOST_PADDING * shape[0]
        and shape[1] % shards == 0
    )
    return ShardPlacement(shape, shards, int(by_columns))
