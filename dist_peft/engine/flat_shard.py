"""A rank's part of a tensor that is sharded by elements, not by rows: DeepSpeed's form.

ZeRO flattens parameters and cuts the result into equal parts, so that a part may begin and end in
the middle of a row. A checkpoint stores boxes (offsets and sizes by dimension): a part of a matrix
is at most the rest of a row, whole rows, and the beginning of a row.
"""

import math
from dataclasses import dataclass

from torch import Tensor

__all__ = ["Box", "FlatShard", "split_into_boxes"]

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and sizes, by dimension."""


@dataclass(frozen=True)
class FlatShard:
    """Consecutive elements of a tensor in row-major order.

    Attributes:
        shape: of the whole tensor.
        start: number of the first element.
        values: the elements, one dimension; may be empty. Those of all ranks make up the tensor.
    """

    shape: tuple[int, ...]
    start: int
    values: Tensor

    def list_boxes(self) -> list[Box]:
        """Return boxes that hold ``values``, in their order."""
        return split_into_boxes(self.shape, self.start, self.start + self.values.numel())

    def numel(self) -> int:
        """Return the number of elements of the whole tensor, as a ``DTensor`` does."""
        return math.prod(self.shape)

    def element_size(self) -> int:
        return self.values.element_size()


def split_into_boxes(shape: tuple[int, ...], start: int, stop: int) -> list[Box]:
    """Split elements ``[start, stop)`` of a tensor, in row-major order, into boxes in that order.

    Args:
        shape: of the tensor; at most 2 d - 1 boxes for d dimensions.
        start, stop: within the tensor.
    """
    if start >= stop:
        return []
    if not shape:
        return [((), ())]
    row = math.prod(shape[1:])
    first, head = divmod(start, row)
    last, tail = divmod(stop, row)
    if first == last:
        return _shift_boxes(first, split_into_boxes(shape[1:], head, tail))
    boxes: list[Box] = []
    if head:
        boxes += _shift_boxes(first, split_into_boxes(shape[1:], head, row))
        first += 1
    if first < last:
        boxes.append(((first, *(0 for _ in shape[1:])), (last - first, *shape[1:])))
    return boxes + _shift_boxes(last, split_into_boxes(shape[1:], 0, tail))


def _shift_boxes(row: int, boxes: list[Box]) -> list[Box]:
    """Return boxes of one row as boxes of the tensor that the row is in."""
    return [((row, *offsets), (1, *sizes)) for offsets, sizes in boxes]
