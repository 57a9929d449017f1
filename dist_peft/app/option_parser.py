"""The parser of the command line, which knows options of other trainers.

There ``--learning_rate 1e-4`` is an option; here keys of the configuration are ``train.lr=1e-4``,
and an option that does not exist is refused with the key that it stands for.
"""

import argparse
import re
from typing import NoReturn

from dist_peft.app.json_output import print_refusal
from dist_peft.core.config.peer_keys import find_peer_key

__all__ = ["OptionParser", "add_verbosity_arguments", "find_option_hints"]


class OptionParser(argparse.ArgumentParser):
    """argparse's, with a hint for options that are keys of a configuration."""

    def error(self, message: str) -> NoReturn:
        """Print the usage and ``message`` with hints, and exit with code 2."""
        hints = find_option_hints(message) if message.startswith("unrecognized") else []
        print_refusal("; ".join([message, *hints]), 2)
        super().error("; ".join([message, *hints]))


def add_verbosity_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``-q`` and ``-v``, as ``verbosity``: ``quiet``, ``normal`` or ``verbose``."""
    choice = parser.add_mutually_exclusive_group()
    for short, value, text in (
        ("-q", "quiet", "show warnings and errors only"),
        ("-v", "verbose", "show more: reasons for debugging, and lines of every rank"),
    ):
        choice.add_argument(
            short,
            f"--{value}",
            dest="verbosity",
            action="store_const",
            const=value,
            default="normal",
            help=text,
        )


def find_option_hints(message: str) -> list[str]:
    """Return, for each ``--option`` in ``message``, where it is in a configuration, if it is."""
    # pydantic takes a part of a second to import, which only a wrong option needs
    from dist_peft.core.config.validation_messages import list_config_keys

    hints = []
    for option in re.findall(r"(?<!\S)--([\w.-]+)", message):
        name = option.replace("-", "_")
        keys = [key for key in list_config_keys() if name in (key, key.rpartition(".")[2])]
        if (peer := find_peer_key(name)) is not None:
            hints.append(
                f"--{option}: {peer.describe()}; keys are written KEY=VALUE, without dashes"
            )
        elif len(keys) == 1:
            hints.append(f"--{option}: write {keys[0]}=VALUE, without dashes")
    return hints
