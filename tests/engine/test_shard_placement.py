"""Rows or columns, by bytes."""

import pytest
import torch

from dist_peft.core.span import Span
from dist_peft.engine.shard_placement import choose_shard_placement


@pytest.mark.parametrize(
    ("shape", "shards", "dimension"),
    [
        ((16, 8192), 8, 0),  # even rows
        ((16, 8192), 512, 1),
        ((16, 8192), 24, 0),  # 24 does not divide the columns
        ((5, 120), 3, 1),  # a row more than there are: a fifth
        ((101, 303), 3, 0),  # one row in a hundred
        ((16,), 512, 0),
        ((2, 3, 512), 512, 0),
    ],
)
def test_placement(shape: tuple[int, ...], shards: int, dimension: int) -> None:
    parameter = torch.empty(shape, device="meta")
    placement = choose_shard_placement(parameter, shards)
    assert placement.dimension == dimension
    own = [placement.count_local_elements(rank) for rank in range(shards)]
    assert sum(own) == parameter.numel() and max(own) <= placement.count_padded_elements()
    if dimension:
        assert set(own) == {placement.count_padded_elements()}


def test_seventy_billion_parameters_on_512_ranks_gather_each_factor_once() -> None:
    factors = [(16, 8192)] * 6 + [(16, 28672), (8192, 16), (1024, 16), (28672, 16)]
    for shape in factors:
        placement = choose_shard_placement(torch.empty(shape, device="meta"), 512)
        assert 512 * placement.count_padded_elements() == shape[0] * shape[1]


def test_packed_rows_are_never_cut() -> None:
    packed = torch.empty(1, 512, dtype=torch.uint8, device="meta")
    assert choose_shard_placement(packed, 4).dimension == 0


def test_columns_are_cut_from_all_rows() -> None:
    value = torch.arange(12.0).view(2, 6)
    placement = choose_shard_placement(value, 3)
    assert [placement.wanted_rows(rank) for rank in range(3)] == [Span(0, 2)] * 3
    parts = [placement.cut_columns(value, rank) for rank in range(3)]
    assert torch.equal(torch.cat(parts, 1), value)
    whole = choose_shard_placement(value, 2)
    assert whole.wanted_rows(1) == Span(1, 2)
    assert torch.equal(whole.cut_columns(value[1:], 1), value[1:])
