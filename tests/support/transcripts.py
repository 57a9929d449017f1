"""Transcripts in pages of ``docs/``: commands, and the lines that they print.

A page has files, blocks of ``yaml title="NAME"``, and commands with their output, blocks of ``text
transcript``. Each line of a block must be in the command's output, in this order; ``...`` stands
for lines that are left out, and without it no line may be missing. A command continues in lines
that begin with ``> ``, as in a shell. In a block of ``text
transcript numbers`` all numbers are equal.
"""

import re
from dataclasses import dataclass
from pathlib import Path

__all__ = ["TRANSCRIPTS", "ShownCommand", "find_missing_line", "read_commands", "read_files"]

TRANSCRIPTS = Path(__file__).parents[2] / "docs" / "transcripts"
NUMBER = re.compile(
    r"\b\d{4}-\d\d-\d\dT[\d:.+]+|(?<![\w.])[-+]?\d[\d,.:]*(e[-+]?\d+)?( (B|[KMGT]iB)\b)?"
)
"""A time, or a number with the unit of bytes that depends on its size."""


@dataclass(frozen=True)
class ShownCommand:
    """A command of a page, the lines shown below it, and whether their numbers vary."""

    command: str
    lines: tuple[str, ...]
    has_free_numbers: bool


def read_files(page: str) -> dict[str, str]:
    """Contents by name of the files on a page."""
    return dict(re.findall(r'```yaml title="([\w.]+)"\n(.*?)```', page, re.DOTALL))


def read_commands(page: str) -> list[ShownCommand]:
    """The commands of a page in order."""
    found = []
    for marks, block in re.findall(r"```text transcript( numbers)?\n(.*?)```", page, re.DOTALL):
        _, *parts = re.split(r"^\$ (.*(?:\n> .*)*)\n", block, flags=re.MULTILINE)
        found += [
            ShownCommand(command.replace("\n> ", "\n"), tuple(shown.splitlines()), bool(marks))
            for command, shown in zip(parts[::2], parts[1::2], strict=True)
        ]
    return found


def find_missing_line(shown: ShownCommand, printed: str) -> str | None:
    """Return the first shown line that is not printed at its place, None if all are."""

    def simplify(line: str) -> str:
        return NUMBER.sub("#", line) if shown.has_free_numbers else line

    rest = [simplify(line) for line in printed.splitlines()]
    may_skip = False
    for line in shown.lines:
        if line == "...":
            may_skip = True
            continue
        place = rest.index(simplify(line)) if simplify(line) in rest else -1
        if place < 0 or (place > 0 and not may_skip):
            return line
        rest, may_skip = rest[place + 1 :], False
    return None if may_skip or not rest else f"(after the last line) {rest[0]}"
