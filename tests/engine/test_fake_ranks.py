import pytest
import torch
import torch.distributed as dist

from dist_peft.core.world import World
from dist_peft.engine.fake_ranks import fake_process_group


def test_any_rank_of_any_number() -> None:
    with fake_process_group(World(300, 512, 4, 8, "torchrun")):
        assert (dist.get_rank(), dist.get_world_size()) == (300, 512)
        whole = torch.empty(512)
        dist.all_gather_into_tensor(whole, torch.ones(1))
        with (
            pytest.raises(RuntimeError, match="in a process group already"),
            fake_process_group(World(0, 2, 0, 2, "torchrun")),
        ):
            pass
    assert not dist.is_initialized()


def test_one_rank_has_no_group() -> None:
    with fake_process_group(World()):
        assert not dist.is_initialized()
