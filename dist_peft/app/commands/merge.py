"""``dist-peft merge``: write base + adapter of a finished run as a Hugging Face directory."""

import argparse
import json

from dist_peft.app.checkpoint_adapter import open_trained_run
from dist_peft.app.export_options import (
    add_merge_arguments,
    add_run_arguments,
    parse_verification_options,
    require_one_process,
)
from dist_peft.app.verified_export import merge_finished_run
from dist_peft.core.log import setup_log
from dist_peft.core.world import World

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``dist-peft merge``."""
    add_run_arguments(parser)
    add_merge_arguments(parser)


def run(args: argparse.Namespace, world: World) -> int:
    """Merge, reload and compare; return 0.

    Raises:
        UserError: the run cannot be merged, or there are several processes.
        VerificationError: the merged model is not the trained one.
    """
    require_one_process(world)
    setup_log(None, 0, 1)
    verify, trust = parse_verification_options(args), args.trust_remote_code
    with open_trained_run(
        args.run_dir, args.checkpoint, with_probe=verify is not None, trust_remote_code=trust
    ) as run_dir:
        outcome = merge_finished_run(
            run_dir,
            args.out,
            into=args.base or "original",
            dtype=args.dtype,
            keep_zeros=args.keep_zeros,
            verify=verify,
            trust_remote_code=trust,
            overwrite=args.overwrite,
        )
    if args.json:
        print(json.dumps(outcome.to_json()))
    return 0
