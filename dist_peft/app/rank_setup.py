"""Join the ranks of a command and check that they run the same configuration."""

import torch

from dist_peft.app.run_identity import flatten_rank_config
from dist_peft.core.config.run import RunConfig
from dist_peft.core.world import World

__all__ = ["join_ranks"]


def join_ranks(config: RunConfig, world: World) -> torch.device:
    """Join the process group and return the device that this rank computes on.

    Raises:
        UserError: on every rank: the device is absent, a rank did not come in time, or ranks have
            different configurations; names the keys.
    """
    device = world.select_device(config.train.device)
    world.join_process_group(
        device, config.engine.timeout_minutes, config.engine.start_timeout_minutes
    )
    world.check_agreement("configuration", flatten_rank_config(config, world))
    return device
