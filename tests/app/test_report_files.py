import json
from dataclasses import replace
from pathlib import Path

import pytest

from dist_peft.app.report_files import add_report_section, rewrite_report
from dist_peft.app.run_report import write_run_report
from dist_peft.core.errors import UserError
from dist_peft.train.report_page import ReportSection
from dist_peft.train.run_summary import RunSummary

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


def test_a_report_is_drawn_again_from_its_files(tmp_path: Path) -> None:
    norms = (("0", 1.5),)
    summary = replace(SUMMARY, data=(("Longest", "9"),), layer_norms=norms, norm_meaning="norm")
    page = write_run_report(tmp_path, summary).read_text()
    (tmp_path / "report.html").unlink()
    drawn = rewrite_report(tmp_path).read_text()
    assert drawn.split("<footer>")[0] == page.split("<footer>")[0] and "<td>9</td>" in drawn


def test_descriptions_of_earlier_versions_have_fewer_tables(tmp_path: Path) -> None:
    write_run_report(tmp_path, SUMMARY)
    tree = json.loads((tmp_path / "report.json").read_text())
    for name in ("data", "environment", "layer_norms", "norm_meaning"):
        del tree["summary"][name]
    (tmp_path / "report.json").write_text(json.dumps(tree))
    assert "12,345" in rewrite_report(tmp_path).read_text()
