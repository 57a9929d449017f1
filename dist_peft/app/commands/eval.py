"""``dist-peft eval``: held-out loss of a base, or of a run's newest state; multiple choice."""

import argparse

from dist_peft.app.config_arguments import (
    add_checkpoint_argument,
    add_config_arguments,
    parse_path,
)
from dist_peft.app.evaluation import evaluate_run
from dist_peft.app.json_output import print_document
from dist_peft.core.config.io import load_config, load_run_config
from dist_peft.core.config.run import RunConfig
from dist_peft.core.errors import UserError
from dist_peft.core.world import World

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``dist-peft eval``."""
    add_config_arguments(parser, required=False)
    parser.add_argument(
        "--run", type=parse_path, dest="run_dir", help="use this run's newest state"
    )
    add_checkpoint_argument(parser, default="last")
    parser.add_argument(
        "--choices",
        type=parse_path,
        action="append",
        metavar="FILE",
        help="also answer the multiple-choice questions of a JSON Lines file; may be repeated",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print nothing but the JSON, of a refusal too (the result is a line of JSON anyway)",
    )


def run(args: argparse.Namespace, world: World) -> int:
    """Evaluate and print one JSON line; return 0.

    The line is ``{"eval_loss": nats, "step": steps trained}``, with ``eval_by_task`` for several
    held-out sources, the accuracies of each file of ``--choices``, and ``eval_accuracy`` and
    ``eval_macro_f1`` of a classifier.

    For a run of separate tasks it is ``{"adapters": {NAME: the above}, "own": {NAME: loss}}``; the
    base is loaded once. ``own`` is each adapter's loss on the held-out source of its task. A
    classifier, which has the labels of its task only, is evaluated on that source only.

    Raises:
        UserError: no held-out data, no complete checkpoint, or a checkpoint of another base.
    """
    config = _load_config(args)
    if not config.data.held_out:
        raise UserError(
            "data.eval is empty: nothing to evaluate; name a held-out file in data.eval, or set "
            "data.val_split"
        )
    if args.choices and config.data.is_classification:
        raise UserError("--choices asks a language model; with base.head classifier leave it out")
    found = evaluate_run(config, args.run_dir, args.choices or (), world, args.checkpoint)
    if world.is_first:
        print_document(found)
    return 0


def _load_config(args: argparse.Namespace) -> RunConfig:
    """Return the configuration of ``--config``, or that of the run of ``--run``."""
    if args.config is not None:
        return load_config(args.config, args.overrides)
    if args.run_dir is None:
        raise UserError(
            "give --run DIR to evaluate a run, or --config FILE to evaluate the base of a "
            "configuration"
        )
    file = args.run_dir / "config.yaml"
    if not file.is_file():
        raise UserError(f"{args.run_dir} is no run directory: it has no config.yaml")
    return load_run_config(file, args.overrides, trust_remote_code=False)
