"""The generated reference page is up to date and complete."""

from pathlib import Path

from dist_peft.core.config.docs import build_configuration_page
from dist_peft.core.config.run import RunConfig


def test_page_is_up_to_date() -> None:
    page = Path(__file__).parents[3] / "docs" / "configuration.md"
    assert page.read_text() == build_configuration_page(), (
        "run: python -m dist_peft.core.config.docs > docs/configuration.md"
    )


def test_every_section_is_there() -> None:
    page = build_configuration_page()
    for section in RunConfig.model_fields:
        assert f"## {section}" in page
    assert "| `lr` | number | `0.0002` | Peak learning rate. |" in page
