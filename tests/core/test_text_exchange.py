"""Texts of any length arrive as they were sent, in the order of the ranks, on a group as well."""

from typing import Any

import pytest
import torch.distributed as dist

from dist_peft.core.text_exchange import (
    all_gather_texts,
    broadcast_text,
    gather_texts,
    scatter_texts,
)
from dist_peft.core.world import World
from tests.support.dist import run_ranks
from tests.support.pickles import count_pickles

TEXTS = ["", "ä" * 5, "b\n\0"]


def exchange(world: World) -> list[Any]:
    rank = world.rank
    with count_pickles() as pickles:
        found: list[Any] = [
            all_gather_texts(TEXTS[rank]),
            all_gather_texts(""),
            gather_texts(TEXTS[rank]),
            gather_texts(""),
            scatter_texts(TEXTS if rank == 0 else []),
            scatter_texts([""] * 3 if rank == 0 else []),
            broadcast_text(TEXTS[rank + 1] if rank == 0 else "other"),
            broadcast_text(""),
        ]
        part = dist.new_group([1, 2], backend="gloo")
        if rank:
            found += [all_gather_texts(TEXTS[rank], part), gather_texts(TEXTS[rank], part)]
            found += [scatter_texts(["x", "yy"], part), broadcast_text(TEXTS[rank], part)]
        assert pickles == []
        dist.all_gather_object([None] * 3, rank)
        assert set(pickles) == {"_object_to_tensor", "_tensor_to_object"}  # the count is one
    return found


@pytest.mark.dist
def test_three_ranks() -> None:
    results = run_ranks(exchange, 3)
    for rank, found in enumerate(results):
        first = rank == 0
        gathered = [TEXTS if first else [], [""] * 3 if first else []]
        assert found[:8] == [TEXTS, [""] * 3, *gathered, TEXTS[rank], "", TEXTS[1], ""]
    part = TEXTS[1:]
    assert results[1][8:] == [part, part, "x", TEXTS[1]]
    assert results[2][8:] == [part, [], "yy", TEXTS[1]]


def test_one_process_exchanges_nothing() -> None:
    assert all_gather_texts("a") == gather_texts("a") == ["a"]
    assert scatter_texts(["a"]) == broadcast_text("a") == "a"
