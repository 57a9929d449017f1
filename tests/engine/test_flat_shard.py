"""Boxes of a part of a tensor that begins and ends anywhere."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from dist_peft.engine.flat_shard import FlatShard, split_into_boxes

SHAPES = st.lists(st.integers(1, 5), max_size=4).map(tuple)


@given(SHAPES, st.data())
def test_boxes_hold_the_elements_in_order(shape: tuple[int, ...], data: st.DataObject) -> None:
    whole = torch.arange(math.prod(shape)).view(shape)
    start = data.draw(st.integers(0, whole.numel()))
    stop = data.draw(st.integers(start, whole.numel()))
    boxes = split_into_boxes(shape, start, stop)
    assert len(boxes) <= max(1, 2 * len(shape) - 1)
    parts = [
        whole[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))]
        for offsets, sizes in boxes
    ]
    assert all(part.shape == sizes for part, (_, sizes) in zip(parts, boxes, strict=True))
    found = [value for part in parts for value in part.flatten().tolist()]
    assert found == list(range(start, stop))


def test_sizes_are_those_of_the_whole_tensor() -> None:
    shard = FlatShard((5, 3), 4, torch.zeros(7))
    assert (shard.numel(), shard.element_size()) == (15, 4)
    assert shard.list_boxes() == [((1, 1), (1, 2)), ((2, 0), (1, 3)), ((3, 0), (1, 2))]
    assert FlatShard((5, 3), 15, torch.zeros(0)).list_boxes() == []
