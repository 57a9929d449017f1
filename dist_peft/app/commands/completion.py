"""``dist-peft completion SHELL``: print a completion script, which shtab makes of the parsers."""

import argparse

from dist_peft.app.cli import build_verb_parser
from dist_peft.app.config_arguments import parse_path
from dist_peft.core.errors import UserError
from dist_peft.core.world import World

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``dist-peft completion``."""
    parser.add_argument("shell", choices=("bash", "zsh", "tcsh"))


def run(args: argparse.Namespace, world: World) -> int:
    """Print the script of all verbs and their options; return 0.

    Raises:
        UserError: shtab is not installed.
    """
    try:
        import shtab
    except ImportError:
        raise UserError(
            "completion scripts are made by shtab, which is not installed: "
            "pip install 'dist_peft[completion]'"
        ) from None
    parser = build_verb_parser(None)
    _mark_paths(parser, shtab.FILE)
    if world.is_first:
        print(shtab.complete(parser, shell=args.shell))
    return 0


def _mark_paths(parser: argparse.ArgumentParser, complete: object) -> None:
    """Set the attribute of options with a path by which shtab completes names of files."""
    for action in parser._actions:
        if action.type is parse_path:
            action.complete = complete  # type: ignore[attr-defined]
        if isinstance(action, argparse._SubParsersAction):
            for verb in action.choices.values():
                _mark_paths(verb, complete)
