"""Verdict and lines of a report."""

from dist_peft.app.validation_report import MemoryReport, RenderedRow, RunReport, ValidationReport
from dist_peft.app.validation_text import (
    format_validation,
    list_memory_rows,
    list_run_rows,
    summarize_validation,
)
from dist_peft.data.sequence_text import SequencePart


def test_verdict() -> None:
    report = ValidationReport()
    assert summarize_validation(report) == "ready to train"
    report.warnings = ["a", "b"]
    assert summarize_validation(report) == "ready to train: 2 warnings"
    report.memory = MemoryReport(1, 8, "fsdp2", 5, 4, {})
    assert summarize_validation(report).startswith("not ready: more memory than the card has")
    report.problems = ["c"]
    assert summarize_validation(report).startswith("not ready: more memory")
    lines = format_validation(report, 8, color=False)
    assert lines[-4:] == ["", "problem: c", "", summarize_validation(report)]


def test_steps_and_memory() -> None:
    run = RunReport(64, 0, 64.0, 8, 16, 0.5, packed=True)
    rows = dict(list_run_rows(run))
    assert rows["steps"] == "8 of 16 sequences, 2.00 epochs" and "50.0 %" in rows["training"]
    assert rows["held out"].startswith("none")
    memory = dict(list_memory_rows(MemoryReport(2, 8, "fsdp2", 2**31, 2**30, {"adapter": 2**20})))
    assert memory["planned for"] == "2 x 8 cards, engine fsdp2" and "adapter" in memory
    assert memory["card"] == "1.00 GiB: DOES NOT FIT"


def test_control_characters_are_written_out() -> None:
    parts = [SequencePart("a\x1b[2J\n\tb", False), SequencePart("\x9bc", True)]
    report = ValidationReport(rows=[RenderedRow("k", 0, 3, parts)])
    text = "\n".join(format_validation(report, 8, color=False))
    assert "a\\x1b[2J\n\tb[[\\x9bc]]" in text
    colored = "\n".join(format_validation(report, 8, color=True))
    assert "\\x1b[2J" in colored and "\x1b[2J" not in colored and "\x1b[1;32m" in colored
