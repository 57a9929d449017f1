from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from dist_peft.core.collective_errors import is_collective_error
from dist_peft.core.world import World
from tests.support.dist import run_ranks


def _wait_for_absent_rank(world: World) -> list[str]:
    """Have three collectives pending as their time ends: only one of them has timed out itself."""
    group = dist.new_group(timeout=timedelta(seconds=0.5))
    messages = []
    if world.is_first:
        pending = [dist.all_reduce(torch.ones(3), group=group, async_op=True) for _ in range(3)]
        for work in pending:
            with pytest.raises(RuntimeError) as caught:
                work.wait()
            assert is_collective_error(caught.value), caught.value
            messages.append(str(caught.value))
    world.barrier()
    return messages


@pytest.mark.dist
def test_collectives_that_are_pending_as_one_times_out() -> None:
    messages, _ = run_ranks(_wait_for_absent_rank, 2)
    assert len(messages) == 3
    assert any("gloo" not in message for message in messages), messages


def test_errors_of_torchs_own_kinds() -> None:
    assert is_collective_error(dist.DistBackendError("NCCL"))
    assert is_collective_error(dist.DistStoreError("wait timeout after 2ms"))


def test_other_errors_are_none() -> None:
    assert not is_collective_error(ValueError("no file gloo.txt"))
    assert not is_collective_error(RuntimeError("shapes do not match"))
