"""The transcripts of ``docs/transcripts``: each command runs, and prints the lines that are shown.

A page has files, blocks of ``yaml title="NAME"``, and commands with their output, blocks of ``text
transcript``. Each line of a block must be in the command's output, in this order; ``...`` stands
for lines that are left out, and without it no line may be missing. In a block of ``text
transcript numbers`` all numbers are equal.
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest

from dist_peft.app import cli
from dist_peft.core.log import close_log

ROOT = Path(__file__).parents[1]
TRANSCRIPTS = ROOT / "docs" / "transcripts"
NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,.:]*(e[-+]?\d+)?( (B|[KMGT]iB)\b)?")
"""A number, with the unit of bytes that depends on its size."""


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
        _, *parts = re.split(r"^\$ (.*)\n", block, flags=re.MULTILINE)
        found += [
            ShownCommand(command, tuple(shown.splitlines()), bool(marks))
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


def test_a_line_that_is_not_printed_is_found() -> None:
    (shown,) = read_commands("```text transcript\n$ dist-peft eval\none 1\n...\nthree 3\n```")
    assert shown.command == "dist-peft eval" and not shown.has_free_numbers
    assert find_missing_line(shown, "one 1\ntwo\nthree 3\n") is None
    assert find_missing_line(shown, "one 2\ntwo\nthree 3\n") == "one 1"
    assert find_missing_line(shown, "three 3\none 1\n") == "one 1"
    assert find_missing_line(shown, "one 1\nthree 3\nfour\n") == "(after the last line) four"
    (free,) = read_commands("```text transcript numbers\n$ dist-peft eval\none 1e-3\n```")
    assert find_missing_line(free, "one 2.50\n") is None
    (size,) = read_commands("```text transcript numbers\n$ dist-peft eval\npeak 541 MiB  eta\n```")
    assert find_missing_line(size, "peak 1.83 GiB  eta\n") is None
    assert find_missing_line(size, "peak 1.83 s  eta\n") == "peak 541 MiB  eta"
    assert find_missing_line(free, "one more\n") == "one 1e-3"


@pytest.mark.data
@pytest.mark.e2e
def test_own_data_page_prints_its_lines(
    shared_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIST_PEFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_COLOR", "1")
    Path("base").symlink_to(shared_data / "stories260K-hf")
    Path("questions.jsonl").symlink_to(shared_data / "gsm8k" / "train.jsonl")
    dialogues = shared_data / "llamafactory-demo" / "glaive_toolcall_en_demo.json"
    Path("dialogues.json").symlink_to(dialogues)
    page = (TRANSCRIPTS / "own_data.md").read_text()
    for name, content in read_files(page).items():
        Path(name).write_text(content)
    verbs = []
    for shown in read_commands(page):
        program, *arguments = shlex.split(shown.command)
        assert program == "dist-peft"
        code = cli.main(arguments)
        close_log()
        captured = capsys.readouterr()
        verbs.append((arguments[0], code))
        is_log = arguments[0] in ("train", "export")  # they print no result, only their log
        printed = captured.err if is_log else captured.out
        assert find_missing_line(shown, printed) is None, printed
    # the first check refuses the page's file on purpose
    assert verbs == [("validate", 2), ("validate", 0), ("train", 0), ("chat", 0), ("export", 0)]
    assert Path("served/model-q8_0.gguf").is_file()
