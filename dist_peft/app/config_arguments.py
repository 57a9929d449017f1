"""Arguments of the verbs that read a configuration file."""

import argparse
from pathlib import Path

__all__ = ["add_config_arguments"]


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--config FILE`` and the overrides ``key.sub=value``."""
    parser.add_argument("--config", required=True, type=Path, help="YAML file")
    parser.add_argument(
        "--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS
    )  # added by the deepspeed launcher; the environment says the same
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="change a key")
