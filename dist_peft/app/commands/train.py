"""``dist-peft train``: fine-tune an adapter."""

import argparse
from pathlib import Path

from dist_peft.app.config_arguments import add_config_arguments
from dist_peft.app.earlier_log import name_run_directory
from dist_peft.app.exact_scope import fix_kernels
from dist_peft.app.help_texts import format_sections
from dist_peft.app.rank_setup import join_ranks
from dist_peft.app.tasks import check_task_config
from dist_peft.app.training_run import train_until_stopped
from dist_peft.core.config.io import find_save_directory, load_config
from dist_peft.core.config.run import RunConfig
from dist_peft.core.errors import UserError
from dist_peft.core.stop_signals import catch_stop_signals
from dist_peft.core.world import World, close_stall_watch

__all__ = ["add_arguments", "run", "train_from_config"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``dist-peft train``."""
    add_config_arguments(parser)
    parser.add_argument_group("sections of the configuration (key.sub=value)", format_sections())


def run(args: argparse.Namespace, world: World) -> int:
    """Train the configuration of ``--config`` and its overrides; return the exit code."""
    name_run_directory(find_save_directory(args.config, args.overrides), world)
    return train_from_config(load_config(args.config, args.overrides), world)


def train_from_config(config: RunConfig, world: World) -> int:
    """Train ``config`` to its last step, or until a signal; return the exit code.

    Raises:
        UserError: on every rank, whichever rank found the error.
    """
    name_run_directory(Path(config.save.dir), world)
    if config.adapter.kind == "none":
        raise UserError("adapter.kind is none: nothing would be trained; choose lora")
    if config.train.tasks == "separate":
        check_task_config(config)  # fail fast, before the rendezvous
    device = join_ranks(config, world)
    fix_kernels(config, device)
    try:
        with catch_stop_signals() as stop:
            return train_until_stopped(config, world, device, stop)
    finally:
        if world.size == 1:  # ranks are watched until they leave the group
            close_stall_watch()
