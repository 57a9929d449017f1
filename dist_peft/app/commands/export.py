"""``dist-peft export``: write a finished run in a public format."""

import argparse
from pathlib import Path

from dist_peft.app.checkpoint_adapter import open_trained_run
from dist_peft.app.export_adapter import VerificationOptions, export_adapter
from dist_peft.app.export_options import (
    ADAPTERS,
    add_export_arguments,
    add_run_arguments,
    parse_verification_options,
    require_one_process,
    warn_unused_arguments,
)
from dist_peft.app.finished_run import load_finished_run
from dist_peft.app.verified_export import export_finished_run, merge_finished_run
from dist_peft.core.log import setup_log
from dist_peft.core.world import World

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``dist-peft export``."""
    add_export_arguments(parser)
    add_run_arguments(parser)


def run(args: argparse.Namespace, world: World) -> int:
    """Write ``--format``, load it with its consumer and compare; return 0.

    Raises:
        UserError: the format cannot take this run, or there are several processes.
        VerificationError: the written model is not the trained one.
    """
    require_one_process(world)
    setup_log(None, 0, 1)
    warn_unused_arguments(args)
    verify, trust = parse_verification_options(args), args.trust_remote_code
    with open_trained_run(
        args.run_dir, args.checkpoint, with_probe=verify is not None, trust_remote_code=trust
    ) as run_dir:
        _export_run(args, run_dir, verify)
    return 0


def _export_run(
    args: argparse.Namespace, run_dir: Path, verify: VerificationOptions | None
) -> None:
    trust, overwrite = args.trust_remote_code, args.overwrite
    if args.format == "hf-bf16":
        into = args.base or "original"
        merge_finished_run(
            run_dir,
            args.out,
            into=into,
            verify=verify,
            trust_remote_code=trust,
            overwrite=overwrite,
        )
    elif args.format in ADAPTERS:
        config = load_finished_run(run_dir, trust_remote_code=trust)
        export_adapter(config, run_dir, args.format, args.out, verify=verify, overwrite=overwrite)
    else:
        options = {
            "overwrite": overwrite,
            "into": args.base or "original",
            "bits": args.bits,
            "group_size": args.group_size,
            "kind": args.type,
            "merge": args.merge,
            "lossy": args.lossy,
            "keep_adapter": args.keep_adapter,
        }
        export_finished_run(
            run_dir, args.format, args.out, options, verify=verify, trust_remote_code=trust
        )
