"""What the steps of ``first_half_hour.sh`` share: arguments, the device, the result's file."""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from common import write_result

__all__ = ["finish", "parse_arguments", "pick_device"]


def parse_arguments(document: str | None, add: Any = lambda parser: None) -> argparse.Namespace:
    """Parse ``--out`` and ``--dry-run``; ``add`` adds further arguments to the parser."""
    parser = argparse.ArgumentParser(description=(document or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory of the result")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, on the CPU")
    add(parser)
    return parser.parse_args()


def pick_device(args: argparse.Namespace) -> torch.device:
    """The first GPU; the CPU in a dry run. Exits where there is no GPU."""
    if args.dry_run:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        sys.exit("torch sees no CUDA device; --dry-run runs on the CPU")
    return torch.device("cuda", 0)


def finish(
    name: str, args: argparse.Namespace, result: dict[str, Any], failures: list[str]
) -> None:
    """Write ``OUT/NAME.json`` and exit with 1 if there are failures."""
    write_result(name, {"dry_run": args.dry_run, "failures": failures, **result}, args.out)
    if failures:
        sys.exit("\n".join(failures))
