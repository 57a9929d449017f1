"""Chunks of all ranks behind each other, whichever way they travel."""

import pytest
import torch
import torch.distributed as dist

from dist_peft.core.world import World
from dist_peft.engine.chunk_gather import all_gather_chunks
from tests.support.dist import run_ranks


def gather_in_every_way(world: World) -> list[str]:
    """Return the ways whose result is wrong."""
    group = dist.group.WORLD
    assert group is not None
    wrong = []
    for largest in (1, 8):  # the collective, broadcasts
        for size in (0, 1, 1000):
            shares = [
                torch.arange(size).add(7 * rank).to(torch.uint8) for rank in range(world.size)
            ]
            expected, local = torch.cat(shares), shares[world.rank]
            for is_in_place in (False, True):
                for async_op in (False, True):
                    pairs = []
                    for _ in range(3):  # under way together
                        output = torch.zeros(world.size * size, dtype=torch.uint8)
                        own = local.clone()
                        if is_in_place:
                            own = output.view(world.size, size)[world.rank]
                            own.copy_(local)
                        pairs.append(
                            (output, all_gather_chunks(output, own, group, async_op, largest))
                        )
                    for output, work in pairs:
                        assert (work is not None) == async_op
                        if work is not None:
                            work.wait()
                        if not torch.equal(output, expected):
                            wrong.append(f"{largest} {size} {is_in_place} {async_op}")
    return wrong


@pytest.mark.dist
@pytest.mark.parametrize("ranks", [2, 3])
def test_every_rank_has_all_chunks_in_order(ranks: int) -> None:
    assert run_ranks(gather_in_every_way, ranks) == [[]] * ranks
