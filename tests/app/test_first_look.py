"""The transcript of docs/first_look.md: its commands print what the page shows."""

import re
import shlex
from pathlib import Path

import pytest

from tests.support.command_line import lines

pytestmark = [pytest.mark.data, pytest.mark.e2e]

PAGE = Path(__file__).parents[2] / "docs" / "first_look.md"


def read_transcript() -> dict[str, str]:
    """Output by command."""
    (block,) = re.findall(r"```text transcript\n(.*?)```", PAGE.read_text(), re.DOTALL)
    _, *parts = re.split(r"^\$ (dist-peft .*)\n", block, flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def test_commands_print_what_the_page_shows(
    shared_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIST_PEFT_CACHE", str(tmp_path / "cache"))
    Path("base").symlink_to(shared_data / "stories260K-hf")
    Path("identity.json").symlink_to(shared_data / "llamafactory-demo" / "identity.json")
    transcript = read_transcript()
    assert [command.split()[1] for command in transcript] == ["init", "validate"]
    for command, shown in transcript.items():
        assert lines(shlex.split(command)[1:], capsys) == shown, command
