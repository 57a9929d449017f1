"""The page ``docs/commands.md``: the ``--help`` of every verb.

``python -m dist_peft.app.command_docs > docs/commands.md``; a test compares the file.
"""

import argparse
from functools import partial

from dist_peft.app.cli import COMMANDS, build_verb_parser

__all__ = ["format_commands_page"]

_HEAD = """# Commands

Every verb as `dist-peft VERB --help` prints it. Made by
`python -m dist_peft.app.command_docs > docs/commands.md`.
"""

_WIDTH = 88


def format_commands_page() -> str:
    """Return the page, the same at any width of the terminal."""
    parser = build_verb_parser(None)
    verbs = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    pages = []
    for name in COMMANDS:
        verb = verbs.choices[name]
        verb.formatter_class = partial(verb.formatter_class, width=_WIDTH)
        pages.append(f"## {name}\n\n```text\n{verb.format_help()}```")
    return "\n".join([_HEAD, "\n\n".join(pages), ""])


if __name__ == "__main__":
    print(format_commands_page(), end="")
