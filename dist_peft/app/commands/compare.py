"""``dist-peft compare RUN RUN ...``: curves over each other, and tables of differences."""

import argparse

from dist_peft.app.comparison_page import (
    check_comparison_file,
    collect_comparison,
    format_comparison,
    write_comparison,
)
from dist_peft.app.config_arguments import parse_path
from dist_peft.app.json_output import print_document
from dist_peft.app.run_comparison import read_runs
from dist_peft.core.world import World

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``dist-peft compare``."""
    parser.add_argument(
        "runs", nargs="+", type=parse_path, metavar="RUN", help="run directories, two or more"
    )
    parser.add_argument(
        "--out",
        type=parse_path,
        metavar="FILE",
        help="write curves and tables (.html), or the curves alone (.svg)",
    )
    parser.add_argument("--json", action="store_true", help="print the comparison as JSON")


def run(args: argparse.Namespace, world: World) -> int:
    """Print the comparison, and write ``--out``; return 0.

    Raises:
        UserError: fewer than two runs, one that is none or is damaged, or a file that cannot be
            written.
    """
    if not world.is_first:
        return 0
    if args.out is not None:
        check_comparison_file(args.out)
    runs = read_runs(args.runs)
    if args.out is not None:
        write_comparison(runs, args.out)
    if args.json:
        print_document(collect_comparison(runs), indent=1)
    else:
        print("\n".join(format_comparison(runs)))
    return 0
