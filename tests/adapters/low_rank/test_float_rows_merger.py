import pytest
import torch

from dist_peft.adapters.low_rank.float_rows_merger import FloatRowsMerger, find_weight_shape
from dist_peft.core.errors import UserError
from dist_peft.core.span import Span
from dist_peft.quant.codec_defaults import AffineParts


def test_rows_that_are_left() -> None:
    merger = FloatRowsMerger("X turns weights")
    assert merger.list_unused_tensors() == []
    merger.rows_left |= {"a.weight": 0, "b.weight": 3}
    assert merger.list_unused_tensors() == ["b.weight"]
    rows = torch.ones(2, 3)
    assert merger.compute_encoded_rows("a.weight", rows, Span(0, 2)) is rows


def test_zeros_are_refused_with_the_reason() -> None:
    merger = FloatRowsMerger("X turns weights")
    parts = AffineParts(*(torch.ones(1, 1) for _ in AffineParts._fields))
    for call in (merger.merge_affine_parts, merger.compute_group_change):
        with pytest.raises(UserError, match=r"^a: X turns weights, which the zeros of an integer"):
            call("a", parts, Span(0, 1))


def test_shapes_of_the_base() -> None:
    shapes = {"a.b.weight": (4, 5)}
    assert find_weight_shape("a.b.weight", shapes) == (4, 5)
    with pytest.raises(UserError, match=r"the adapter adapts c\.d, which the base does not have"):
        find_weight_shape("c.d.weight", shapes)
