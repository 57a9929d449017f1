"""Which ranks share the rows, and which modules are gathered as units of their own."""

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from dist_peft.core.config.run import EngineConfig
from dist_peft.core.errors import UserError
from dist_peft.core.world import World

__all__ = ["build_shard_mesh", "count_shards", "list_end_modules"]


def build_shard_mesh(config: EngineConfig, world: World, device: torch.device) -> DeviceMesh:
    """A mesh with dimension ``shard``, or ``replicate`` x ``shard`` (HSDP).

    Raises:
        UserError: ``engine.shard_group`` does not divide the number of ranks.
    """
    size = count_shards(config, world)
    if size == world.size:
        return init_device_mesh(device.type, (size,), mesh_dim_names=("shard",))
    shape = (world.size // size, size)
    return init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))


def count_shards(config: EngineConfig, world: World) -> int:
    """Return the number of ranks that hold one copy of the base together.

    Raises:
        UserError: ``engine.shard_group`` does not divide the number of ranks.
    """
    size = {"all": world.size, "node": world.local_size}.get(
        str(config.shard_group), config.shard_group
    )
    assert isinstance(size, int)
    if not 1 <= size <= world.size or world.size % size:
        raise UserError(
            f"engine.shard_group is {size} ranks, which does not divide the {world.size} ranks "
            "of this run"
        )
    return size


def list_end_modules(model: nn.Module) -> list[nn.Module]:
    """Input embedding and output head as units of their own, unless they share a weight.

    A classifier's head is none: it is small, trainable, and stays with the root.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    if head is None:
        return [embedding]
    shared = {id(p) for p in embedding.parameters()} & {id(p) for p in head.parameters()}
    return [] if shared else [embedding, head]
