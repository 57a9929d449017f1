"""The page: facts, bars and rows, all text of the data escaped."""

from pathlib import Path

from dist_peft.app.validation_page import write_validation_page
from dist_peft.app.validation_report import RenderedRow, RunReport, ValidationReport
from dist_peft.data.sequence_text import SequencePart


def test_page_is_whole_escaped_and_private(tmp_path: Path) -> None:
    hostile = "</pre><script>alert(1)</script>"
    parts = [SequencePart(hostile, False), SequencePart("yes", True), SequencePart("b", True, True)]
    report = ValidationReport(
        run=RunReport(64, 2, 64.0, 8, 16, 0.5, packed=True),
        rows=[RenderedRow("data.train[0]", 0, 3, parts)],
        warnings=["<i>one</i>"],
        problems=["two"],
    )
    file = tmp_path / "a.html"
    write_validation_page(report, "run <x>.yaml", 8, file)
    page = file.read_text()
    assert "<script" not in page and "&lt;/pre&gt;&lt;script&gt;" in page
    assert "<mark>yes</mark><hr><mark>b</mark>" in page
    assert "run &lt;x&gt;.yaml" in page and "&lt;i&gt;one" in page and "<li>two</li>" in page
    assert "8 of 16 sequences, 2.00 epochs" in page and file.stat().st_mode & 0o77 == 0
