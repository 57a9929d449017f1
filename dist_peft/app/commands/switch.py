"""``dist-peft switch``: give a merged model the adapter of another run, without its base."""

import argparse
from pathlib import Path

from dist_peft.app.config_arguments import parse_path
from dist_peft.app.export_options import (
    add_output_arguments,
    add_verification_arguments,
    parse_verification_options,
    require_one_process,
)
from dist_peft.app.task_switching import switch_tasks
from dist_peft.core.errors import UserError
from dist_peft.core.log import setup_log
from dist_peft.core.world import World

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``dist-peft switch``."""
    parser.add_argument(
        "--merged",
        type=parse_path,
        required=True,
        help="directory written by merge, or by export as mlx or hf-metal of a QA-LoRA run",
    )
    for option, name, text in (
        ("--from", "removed", "run whose adapter is in --merged; none: it holds none"),
        ("--to", "added", "run to switch to; none: back to the base"),
    ):
        parser.add_argument(
            option, type=_parse_run, required=True, dest=name, metavar="RUN|none", help=text
        )
    add_output_arguments(parser)
    add_verification_arguments(parser)


def _parse_run(text: str) -> Path | None:
    return None if text == "none" else parse_path(text)


def run(args: argparse.Namespace, world: World) -> int:
    """Switch, reload and compare; return 0.

    Raises:
        UserError: the directory or a run cannot be switched, or there are several processes.
        VerificationError: the written model is not that of the run.
    """
    require_one_process(world)
    setup_log(None, 0, 1)
    if args.removed is None and args.added is None:
        raise UserError("--from none and --to none: there is nothing to switch")
    switch_tasks(
        args.merged,
        args.removed,
        args.added,
        args.out,
        verify=parse_verification_options(args),
        trust_remote_code=args.trust_remote_code,
        overwrite=args.overwrite,
    )
    return 0
