"""``dist-peft quantize``: write the base packed, as ``base.quant`` says."""

import argparse

from dist_peft.app.config_arguments import add_config_arguments, parse_path
from dist_peft.app.output_places import refuse_taken_place
from dist_peft.app.quantized_base import quantize_base
from dist_peft.app.rank_setup import join_ranks
from dist_peft.core.config.io import load_config
from dist_peft.core.log import setup_log
from dist_peft.core.stop_signals import is_stop_requested
from dist_peft.core.world import World

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``dist-peft quantize``."""
    add_config_arguments(parser)
    parser.add_argument("--out", type=parse_path, required=True, help="new directory")


def run(args: argparse.Namespace, world: World) -> int:
    """Quantize the base into ``--out`` and return 0.

    Raises:
        UserError: on every rank: an unusable base or data, ``--out`` is not empty, no space.
    """
    config = load_config(args.config, args.overrides)
    device = join_ranks(config, world)
    setup_log(None, world.rank, world.size)
    with world.raise_together("look at the output's place"):
        refuse_taken_place(args.out, "--out")
    quantize_base(config, args.out, world, device, is_stop_requested)
    return 0
