"""``dist-peft prune``: write the base with part of its weights zero, or without some blocks."""

import argparse

from dist_peft.app.config_arguments import add_config_arguments, parse_path
from dist_peft.app.output_places import refuse_taken_place
from dist_peft.app.pruning import PRUNING_METHODS, PruningOptions, prune_base
from dist_peft.app.rank_setup import join_ranks
from dist_peft.compress.calibration import CalibrationSize
from dist_peft.core.config.io import load_config
from dist_peft.core.log import setup_log
from dist_peft.core.stop_signals import is_stop_requested
from dist_peft.core.world import World
from dist_peft.quant.sparsity import Sparsity

__all__ = ["add_arguments", "run"]

_LEAST_TOKENS = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``dist-peft prune``."""
    add_config_arguments(parser)
    parser.add_argument("--out", type=parse_path, required=True, help="new directory")
    parser.add_argument(
        "--method",
        choices=PRUNING_METHODS,
        required=True,
        help="magnitude: the smallest weights of each linear. wanda, sparsegpt: by the inputs of "
        "each linear on text from data.train. blocks: whole blocks, the least influential ones",
    )
    parser.add_argument(
        "--sparsity",
        type=_parse_sparsity,
        required=True,
        metavar="SHARE|N:M",
        help="share of zeros, such as 0.5, or N weights kept of each M neighbours, such as 2:4; "
        "with --method blocks the share of blocks",
    )
    parser.add_argument(
        "--calibration-samples",
        type=_parse_count,
        default=128,
        metavar="N",
        help="sequences of text from data.train; default: %(default)s",
    )
    parser.add_argument(
        "--calibration-tokens",
        type=_parse_length,
        default=2048,
        metavar="N",
        help="tokens of a sequence, at most the base's positions; default: %(default)s",
    )


def _parse_sparsity(text: str) -> Sparsity:
    try:
        return Sparsity.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _parse_count(text: str, least: int = 1) -> int:
    if not (text.isascii() and text.isdecimal() and least <= int(text) < 2**31):
        raise argparse.ArgumentTypeError(f"{text} is no whole number from {least} on")
    return int(text)


def _parse_length(text: str) -> int:
    return _parse_count(text, _LEAST_TOKENS)


def run(args: argparse.Namespace, world: World) -> int:
    """Prune the base into ``--out`` and return 0.

    Raises:
        UserError: on every rank: an unusable base or data, options that do not fit it, ``--out`` is
            not empty, no space.
    """
    config = load_config(args.config, args.overrides)
    device = join_ranks(config, world)
    setup_log(None, world.rank, world.size)
    with world.raise_together("look at the output's place"):
        refuse_taken_place(args.out, "--out")
    size = CalibrationSize(args.calibration_samples, args.calibration_tokens, "--calibration-")
    options = PruningOptions(args.method, args.sparsity, size)
    prune_base(config, options, args.out, world, device, is_stop_requested)
    return 0
