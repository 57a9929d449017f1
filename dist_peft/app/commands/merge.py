"""``dist-peft merge``: write base + adapter of a finished run as a Hugging Face directory."""

import argparse

from dist_peft.app.export_options import (
    add_merge_arguments,
    add_run_arguments,
    parse_verification_options,
    print_outcome,
    require_one_process,
)
from dist_peft.app.hub_upload import add_upload_arguments, prepare_upload
from dist_peft.app.python_api import merge_run
from dist_peft.core.log import setup_log
from dist_peft.core.world import World

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``dist-peft merge``."""
    add_run_arguments(parser)
    add_merge_arguments(parser)
    add_upload_arguments(parser)


def run(args: argparse.Namespace, world: World) -> int:
    """Merge, reload and compare; return 0.

    Raises:
        UserError: the run cannot be merged, or there are several processes.
        VerificationError: the merged model is not the trained one.
        RunFailure: it was written, but the hub did not take it.
    """
    require_one_process(world)
    setup_log(None, 0, 1)
    upload = prepare_upload(args)
    outcome = merge_run(
        args.run_dir,
        args.out,
        checkpoint=args.checkpoint,
        into=args.base or "original",
        dtype=args.dtype,
        keep_zeros=args.keep_zeros,
        verify=parse_verification_options(args),
        trust_remote_code=args.trust_remote_code,
        overwrite=args.overwrite,
    )
    print_outcome(outcome, upload, as_json=args.json)
    return 0
