"""``dist-peft convert-config FILE``: an axolotl or LLaMA-Factory configuration as one of ours."""

import argparse
import sys

from dist_peft.app.config_arguments import parse_path
from dist_peft.app.conversion.converted_config import convert_config_file
from dist_peft.app.output_places import refuse_taken_place
from dist_peft.core.errors import UserError
from dist_peft.core.world import World

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``dist-peft convert-config``."""
    parser.add_argument("file", type=parse_path, help="YAML file of axolotl or LLaMA-Factory")
    parser.add_argument("--out", type=parse_path, help="YAML file to write; default: print it")
    parser.add_argument(
        "--ranks",
        type=int,
        default=1,
        help="devices that the file was for: a step has so many times the sequences of one "
        "(default: 1)",
    )


def run(args: argparse.Namespace, world: World) -> int:
    """Write the converted file, list keys without a counterpart on stderr; return 0.

    Raises:
        UserError: the file cannot be converted, or the output exists.
    """
    if args.ranks < 1:
        raise UserError(f"--ranks {args.ranks}: give a number of 1 or more")
    if not world.is_first:
        return 0
    if args.out is not None:
        refuse_taken_place(args.out, "--out")
        if args.out.exists():
            raise UserError(f"--out {args.out} exists; choose another file, or remove it")
    text, draft = convert_config_file(args.file, args.ranks)
    if args.out is None:
        print(text, end="")
    else:
        try:
            args.out.write_text(text, encoding="utf-8")
        except OSError as error:
            raise UserError(f"--out {args.out} cannot be written: {error.strerror}") from None
    for line in draft.unmatched:
        print(f"without a counterpart: {line}", file=sys.stderr)
    if draft.needless:
        print(f"not needed here: {', '.join(draft.needless)}", file=sys.stderr)
    return 0
