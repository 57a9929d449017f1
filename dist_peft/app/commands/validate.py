"""``dist-peft validate``: everything that can be said about a run without weights."""

import argparse
import os
import sys
from pathlib import Path

from dist_peft.app.config_arguments import add_config_arguments, parse_path
from dist_peft.app.json_output import print_document
from dist_peft.app.local_gpu import make_cluster
from dist_peft.app.output_places import refuse_unwritable_file
from dist_peft.app.validation import validate_run
from dist_peft.app.validation_page import write_validation_page
from dist_peft.app.validation_report import ValidationReport
from dist_peft.app.validation_text import format_validation
from dist_peft.core.config.io import load_config
from dist_peft.core.config.run import RunConfig
from dist_peft.core.errors import UserError
from dist_peft.core.log import setup_log
from dist_peft.core.world import World

__all__ = ["DOES_NOT_FIT", "add_arguments", "run"]

DOES_NOT_FIT = 3
"""Exit code where the run needs more memory than the cards have."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``dist-peft validate``."""
    add_config_arguments(parser)
    parser.add_argument("--rows", type=int, default=2, help="sequences to show of each source")
    parser.add_argument(
        "--html", type=parse_path, metavar="FILE", help="write the report as a page"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument(
        "--color",
        choices=("auto", "always", "never"),
        default="auto",
        help="mark tokens in the loss by colour; auto: on a terminal, unless NO_COLOR is set",
    )
    parser.add_argument("--nodes", type=int, default=1, help="hosts to plan for (default: 1)")
    parser.add_argument("--gpus-per-node", type=int, default=1, help="cards of each (default: 1)")
    parser.add_argument("--gpu-memory", help="of a card, such as 24GiB; default: of this host's")
    parser.add_argument("--no-plan", action="store_true", help="do not plan the memory")


def run(args: argparse.Namespace, world: World) -> int:
    """Print the report; return 3 where the run does not fit.

    Raises:
        UserError: with all problems, after the report is printed.
    """
    for option, least in (("rows", 0), ("nodes", 1), ("gpus_per_node", 1)):
        if (number := getattr(args, option)) < least:
            name = option.replace("_", "-")
            raise UserError(f"--{name} {number}: give a number of {least} or more")
    cluster, has_limit = make_cluster(args.nodes, args.gpus_per_node, args.gpu_memory)
    if args.html is not None:
        refuse_unwritable_file(args.html, "--html", ".html")
    config = load_config(args.config, args.overrides)
    setup_log(None, world.rank, world.size)
    if not world.is_first:
        return 0
    report = validate_run(config, cluster, args.rows, has_limit=has_limit, plans=not args.no_plan)
    if args.html is not None:
        write_validation_page(report, args.config.name, config.data.seq_len, args.html)
    _print_report(report, config, args)
    if report.problems:
        raise UserError(_join_problems(report.problems, args.config))
    does_fit = report.memory is None or report.memory.fits is not False
    return 0 if does_fit else DOES_NOT_FIT


def _print_report(report: ValidationReport, config: RunConfig, args: argparse.Namespace) -> None:
    if args.json:
        print_document(report.to_json(), indent=1)
        return
    is_terminal = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    color = args.color == "always" or (args.color == "auto" and is_terminal)
    text = "\n".join(format_validation(report, config.data.seq_len, color=color))
    try:
        print(text, flush=True)
    except BrokenPipeError:  # validate | head
        # or the interpreter's flush at exit fails, too
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _join_problems(problems: list[str], file: Path) -> str:
    if len(problems) == 1:
        return problems[0]
    return f"{file} has {len(problems)} problems: " + "; ".join(
        f"({number}) {text}" for number, text in enumerate(problems, 1)
    )
