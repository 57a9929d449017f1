"""``dist-peft replay``: compute steps of an exact run again and compare them with its record."""

import argparse

from dist_peft.app.config_arguments import parse_path
from dist_peft.app.step_replay import replay_run
from dist_peft.core.stop_signals import catch_stop_signals
from dist_peft.core.world import World

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``dist-peft replay``."""
    parser.add_argument(
        "--run", type=parse_path, dest="run_dir", required=True, help="a run with train.exact"
    )
    parser.add_argument(
        "--from",
        type=int,
        dest="first",
        required=True,
        metavar="STEP",
        help="a step with a checkpoint, or 0: the start of the run",
    )
    parser.add_argument(
        "--to", type=int, dest="last", required=True, metavar="STEP", help="last step to compare"
    )
    parser.add_argument(
        "--other-scope",
        action="store_true",
        help="also on another processor, with other threads or versions, where bits may differ",
    )
    parser.add_argument(
        "--scratch",
        type=parse_path,
        metavar="DIR",
        help="where the steps write their files, which are removed; of several hosts, a directory "
        "that all share; default: that of temporary files",
    )


def run(args: argparse.Namespace, world: World) -> int:
    """Replay and print the result; return 0, or 75 after a signal.

    Raises:
        UserError: the run was not exact, or the steps cannot be computed here as they were.
        AuditError: a step or a file is not as recorded; names the first.
    """
    with catch_stop_signals() as stop:
        return replay_run(
            args.run_dir,
            args.first,
            args.last,
            world,
            stop,
            allow_scope=args.other_scope,
            scratch=args.scratch,
        )
