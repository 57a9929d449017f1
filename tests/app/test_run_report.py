from pathlib import Path

import pytest

from dist_peft.app.run_report import add_report_section, write_run_report
from dist_peft.core.errors import UserError
from dist_peft.train.report import ReportSection, RunSummary

SUMMARY = RunSummary("a/base", "lora", "nf4", "single", 1, (("Trained parameters", "12,345"),))


def test_sections_are_added_and_replaced(tmp_path: Path) -> None:
    write_run_report(tmp_path, SUMMARY)
    add_report_section(tmp_path, ReportSection("Merge", rows=(("Error", "first value"),)))
    add_report_section(tmp_path, ReportSection("Samples", texts=(("prompt", "a\nstory"),)))
    page = add_report_section(
        tmp_path, ReportSection("Merge", rows=(("Error", "second value"),))
    ).read_text()
    for text in ("a/base", "12,345", "second value", "a\nstory"):
        assert text in page
    assert "first value" not in page
    again = write_run_report(tmp_path, SUMMARY).read_text()  # a run that finished again
    assert "second value" not in again and "12,345" in again


def test_an_unfinished_run_has_no_report_to_add_to(tmp_path: Path) -> None:
    add_report_section(tmp_path, ReportSection("Merge"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"summary": {"facts": []}}'])
def test_unreadable_description_is_named(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "report.json").write_text(content)
    with pytest.raises(UserError, match=r"report\.json is not readable .*finish the run first"):
        add_report_section(tmp_path, ReportSection("Merge"))
