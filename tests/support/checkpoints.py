"""Training state to save: three tensors of an odd number of rows, whole or sharded."""

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from dist_peft.core.span import row_span
from dist_peft.core.world import World
from dist_peft.engine.flat_shard import FlatShard
from dist_peft.train.checkpoint import RunPosition

NAMES = ("param/a", "exp_avg/a", "start/b")
ROWS = 7  # divides by neither 2 nor 3


def make_position(step: int) -> RunPosition:
    return RunPosition(step, step * 4, 0, "base", {"train.lr": 1e-3})


def make_whole_state(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(ROWS, 5, generator=generator) for name in NAMES}


def make_sharded_state(world: World, step: int) -> dict[str, Tensor]:
    """The same as DTensors along dimension 0, one of them (``start/b``) left whole."""
    tensors = make_whole_state(step)
    return shard_state(world, tensors)


def make_flat_state(world: World, step: int) -> dict[str, Tensor | FlatShard]:
    """The same in equal parts of elements, as DeepSpeed has them; ``start/b`` left whole."""
    state: dict[str, Tensor | FlatShard] = {}
    for name, tensor in make_whole_state(step).items():
        part = -(-tensor.numel() // world.size)
        start = part * world.rank
        own = tensor.flatten()[start : start + part].clone()
        state[name] = FlatShard(tuple(tensor.shape), start, own)
    state["start/b"] = make_whole_state(step)["start/b"]
    return state


def shard_state(world: World, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    if world.size == 1:
        return {name: t.clone() for name, t in tensors.items()}
    mesh = init_device_mesh("cpu", (world.size,))
    state: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        local = tensor[row_span(ROWS, world.size, world.rank).slice].clone()
        state[name] = DTensor.from_local(
            local, mesh, [Shard(0)], run_check=False, shape=tensor.shape, stride=tensor.stride()
        )
    state["start/b"] = tensors["start/b"].clone()
    return state
