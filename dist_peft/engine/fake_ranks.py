"""A process group of any size in one process, in which nothing is sent.

PyTorch's ``fake`` backend completes every collective at once and leaves its output as it was. The
engines' own code can thus be run, on fake tensors, as rank ``r`` of ``N`` ranks: their spans, their
buffers and the bytes that they gather are those of a real run. Values are not.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from dist_peft.core.world import World

__all__ = ["fake_process_group"]


@contextmanager
def fake_process_group(world: World) -> Iterator[None]:
    """Be rank ``world.rank`` of ``world.size`` ranks inside; one rank has no group.

    Raises:
        RuntimeError: this process is in a process group already.
    """
    if world.size == 1:
        yield
        return
    if dist.is_initialized():
        raise RuntimeError("this process is in a process group already")
    dist.init_process_group("fake", store=FakeStore(), rank=world.rank, world_size=world.size)
    try:
        yield
    finally:
        dist.destroy_process_group()
