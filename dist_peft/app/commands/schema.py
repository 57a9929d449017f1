"""``dist-peft schema``: print the JSON schema of configuration files, for editors."""

import argparse
import json

from dist_peft.core.config.json_schema import build_json_schema
from dist_peft.core.world import World

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``dist-peft schema`` has no options."""


def run(args: argparse.Namespace, world: World) -> int:
    """Print the schema; return 0."""
    if world.is_first:
        print(json.dumps(build_json_schema(), indent=1, ensure_ascii=False))
    return 0
