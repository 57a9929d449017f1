"""The page ``docs/commands.md``: the ``--help`` of every verb.

``python -m dist_peft.app.command_docs > docs/commands.md``; a test compares the file.
"""

import argparse
import os
from unittest import mock

from dist_peft.app.cli import COMMANDS, build_verb_parser

__all__ = ["format_commands_page"]

_HEAD = """# Commands

Every verb as `dist-peft VERB --help` prints it. Made by
`python -m dist_peft.app.command_docs > docs/commands.md`.
"""


def format_commands_page() -> str:
    """Return the page, the same at any width of the terminal."""
    with mock.patch.dict(os.environ, COLUMNS="90"):
        parser = build_verb_parser(None)
        verbs = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
        pages = [
            f"## {name}\n\n```text\n{verbs.choices[name].format_help()}```" for name in COMMANDS
        ]
    return "\n".join([_HEAD, "\n\n".join(pages), ""])


if __name__ == "__main__":
    print(format_commands_page(), end="")
