"""``dist-peft export``: write a finished run in a public format."""

import argparse

from dist_peft.app.export_options import (
    add_export_arguments,
    add_run_arguments,
    collect_format_options,
    parse_verification_options,
    print_outcome,
    require_one_process,
    warn_unused_arguments,
)
from dist_peft.app.hub_upload import add_upload_arguments, prepare_upload
from dist_peft.app.python_api import export_run
from dist_peft.core.log import setup_log
from dist_peft.core.world import World

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``dist-peft export``."""
    add_export_arguments(parser)
    add_run_arguments(parser)
    add_upload_arguments(parser)


def run(args: argparse.Namespace, world: World) -> int:
    """Write ``--format``, load it with its consumer and compare; return 0.

    Raises:
        UserError: the format cannot take this run, or there are several processes.
        VerificationError: the written model is not the trained one.
        RunFailure: it was written, but the hub did not take it.
    """
    require_one_process(world)
    setup_log(None, 0, 1)
    warn_unused_arguments(args)
    upload = prepare_upload(args)
    outcome = export_run(
        args.run_dir,
        args.out,
        args.format,
        collect_format_options(args),
        checkpoint=args.checkpoint,
        into=args.base or "original",
        verify=parse_verification_options(args),
        trust_remote_code=args.trust_remote_code,
        overwrite=args.overwrite,
    )
    print_outcome(outcome, upload, as_json=args.json)
    return 0
