"""Which ranks share the rows, and which modules are gathered as units of their own."""

import itertools
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from dist_peft.core.config.run import EngineConfig
from dist_peft.core.errors import UserError
from dist_peft.core.progress_beat import connect_to_ranks
from dist_peft.core.world import World

__all__ = ["build_shard_mesh", "count_shards", "list_end_modules"]


def build_shard_mesh(config: EngineConfig, world: World, device: torch.device) -> DeviceMesh:
    """A mesh with dimension ``shard``, or ``replicate`` x ``shard`` (HSDP).

    Its groups have the time limit of the default group, ``engine.timeout_minutes``: groups that
    ``init_device_mesh`` makes have torch's own, 30 minutes with gloo and 10 with NCCL.

    Raises:
        UserError: ``engine.shard_group`` does not divide the number of ranks, or is ``node`` and
            ranks that would share rows are on several hosts.
    """
    if config.shard_group == "node":
        _check_node_groups(world)
    size = count_shards(config, world)
    default = dist.group.WORLD
    assert default is not None, "the ranks have not joined"
    if size == world.size:
        return DeviceMesh.from_group(default, device.type, mesh_dim_names=("shard",))
    ranks = torch.arange(world.size, dtype=torch.int).view(-1, size)
    limit = timedelta(minutes=config.timeout_minutes)
    groups = [
        _make_own_group(lines.tolist(), world.rank, limit, f"mesh_{name}")
        for name, lines in (("replicate", ranks.T), ("shard", ranks))
    ]
    names = ("replicate", "shard")
    return DeviceMesh.from_group(groups, device.type, mesh=ranks, mesh_dim_names=names)


def _make_own_group(
    ranks_of_groups: list[list[int]], rank: int, limit: timedelta, name: str
) -> dist.ProcessGroup:
    """Make the groups of one dimension of the mesh, on every rank, and return that of ``rank``.

    With NCCL each is split from the communicator that ``World.join_process_group`` has connected.
    """
    own: dist.ProcessGroup | None = None
    for ranks in ranks_of_groups:
        with connect_to_ranks():
            made = dist.new_group(ranks, timeout=limit, group_desc=name)
        own = made if rank in ranks else own
    assert own is not None
    return own


def _check_node_groups(world: World) -> None:
    """Check that ``world.local_size`` consecutive ranks at a time are all ranks of a host.

    Raises:
        UserError: on every rank: they are not.
    """
    hosts = world.rank_hosts
    runs = [(host, len(list(run))) for host, run in itertools.groupby(hosts)]
    if len(runs) > len(set(hosts)):
        places = ", ".join(f"rank {r} on {host}" for r, host in enumerate(hosts[:4]))
        raise UserError(
            "engine.shard_group: node shards over the ranks of a host, which must be consecutive; "
            f"here the launcher has dealt ranks to hosts in turn ({places}, ...). Start them host "
            "by host (srun --distribution=block, mpirun --map-by slot), or give a number"
        )
    if len({count for _, count in runs}) > 1:
        counts = ", ".join(f"{count} on {host}" for host, count in runs[:4])
        raise UserError(
            "engine.shard_group: node needs equally many ranks on every host; here there are "
            f"{counts}. Start as many on each, or use engine.shard_group: all"
        )
    if runs and runs[0][1] % world.local_size:
        raise UserError(
            f"engine.shard_group: node takes {world.local_size} ranks, which the launcher calls "
            f"those of a host, and {hosts[0]} has {runs[0][1]}; give a number instead"
        )


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
    """Return the input embedding and the output head, which may share a weight.

    A classifier's head is none: it is small, trainable, and stays with the root.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    return [embedding] if head is None or head is embedding else [embedding, head]
