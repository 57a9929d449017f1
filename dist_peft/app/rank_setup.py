"""Start the ranks of a command: rendezvous, the same configuration, files of the base."""

import torch

from dist_peft.app.out_of_memory import remember_memory_options
from dist_peft.app.run_identity import flatten_rank_config
from dist_peft.app.stall_exit import get_stall_handler
from dist_peft.core.config.run import BaseConfig, RunConfig
from dist_peft.core.world import World
from dist_peft.engine.liger_kernels import check_liger_kernels
from dist_peft.model.hub import download_base

__all__ = ["download_base_once", "join_ranks"]


def join_ranks(config: RunConfig, world: World) -> torch.device:
    """Join the process group and return the device that this rank computes on.

    Raises:
        UserError: on every rank: the device is absent, a rank did not come in time, or ranks have
            different configurations; names the keys.
    """
    device = world.select_device(config.train.device)
    if config.engine.kernels == "liger":
        check_liger_kernels(device)
    remember_memory_options(config)
    world.join_process_group(
        device,
        config.engine.timeout_minutes,
        config.engine.start_timeout_minutes,
        stall_seconds=config.engine.stall_seconds,
        on_stall=get_stall_handler(world),
    )
    world.check_agreement("configuration", flatten_rank_config(config, world))
    return device


def download_base_once(base: BaseConfig, world: World) -> None:
    """Download the base's missing files, on the first rank of each node alone. Collective.

    The other ranks wait without a limit of time. Later calls of ``resolve_base_directory`` do not
    ask the hub again.

    Raises:
        UserError: on every rank: neither a directory nor a hub id that is available.
        StopRequested: on every rank, after a signal to any.
    """
    world.run_node_first("find or download base.path", lambda: download_base(base))
    world.raise_if_stop_requested()
