from pathlib import Path

from dist_peft.app.cli import COMMANDS
from dist_peft.app.command_docs import format_commands_page

PAGE = Path(__file__).parents[2] / "docs" / "commands.md"


def test_page_equals_the_help_texts() -> None:
    text = format_commands_page()
    assert PAGE.read_text(encoding="utf-8") == text
    assert all(f"\n## {name}\n" in text for name in COMMANDS)
