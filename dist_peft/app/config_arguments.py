"""Arguments of the verbs that read a configuration file."""

import argparse
from pathlib import Path

from dist_peft.core.input_paths import find_path_fault

__all__ = ["add_checkpoint_argument", "add_config_arguments", "parse_path"]


def parse_path(text: str) -> Path:
    """Return the path of a command-line option; argparse reports text that can be none."""
    if (fault := find_path_fault(text)) is not None:
        raise argparse.ArgumentTypeError(fault)
    return Path(text)


def add_config_arguments(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add ``--config FILE`` and the overrides ``key.sub=value``.

    Args:
        required: of ``--config``; False: the verb can find the file of a run itself.
    """
    note = "" if required else "; default: config.yaml of --run"
    parser.add_argument("--config", required=required, type=parse_path, help=f"YAML file{note}")
    parser.add_argument(
        "--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS
    )  # added by the deepspeed launcher; the environment says the same
    parser.add_argument(
        "overrides", nargs="*", metavar="key.sub=value", help="change a key, such as train.lr=1e-4"
    )


def add_checkpoint_argument(parser: argparse.ArgumentParser, default: str | None) -> None:
    """Add ``--checkpoint STEP|best|last``."""
    note = f"; default: {default}" if default else ""
    parser.add_argument(
        "--checkpoint",
        type=_parse_checkpoint_name,
        default=default,
        metavar="STEP",
        help=f"a checkpoint of the run: a step, best (save.keep_best) or last{note}",
    )


def _parse_checkpoint_name(text: str) -> str:
    if text not in ("best", "last") and not (text.isascii() and text.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text} is neither a step, nor best, nor last")
    return text
