"""``dist-peft report RUN``: draw the report of a finished run again, from its files."""

import argparse

from dist_peft.app.config_arguments import parse_path
from dist_peft.app.report_files import rewrite_report
from dist_peft.core.world import World
from dist_peft.train.report import write_plots

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``dist-peft report``."""
    parser.add_argument("run_dir", type=parse_path, metavar="RUN", help="a finished run")
    parser.add_argument(
        "--pictures",
        type=parse_path,
        metavar="DIR",
        help="also write each plot of the report to a file, DIR/loss.svg and so on",
    )


def run(args: argparse.Namespace, world: World) -> int:
    """Write ``report.html``, with ``--pictures`` its plots as files, and print paths; return 0.

    Raises:
        UserError: no finished run, or one with a damaged file.
    """
    if world.is_first:
        print(rewrite_report(args.run_dir))
        if args.pictures is not None:
            for path in write_plots(args.run_dir, args.pictures):
                print(path)
    return 0
