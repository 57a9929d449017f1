"""The report of ``dist-peft validate`` as one HTML page, without script and links."""

from pathlib import Path

from dist_peft.app.package_files import render_package_file
from dist_peft.app.validation_report import ValidationReport
from dist_peft.app.validation_text import (
    list_memory_rows,
    list_model_rows,
    list_run_rows,
    list_source_rows,
    summarize_validation,
)
from dist_peft.store.writer import write_atomically

__all__ = ["write_validation_page"]


def write_validation_page(report: ValidationReport, name: str, seq_len: int, path: Path) -> None:
    """Write the page to ``path``, readable by the user alone, since it quotes the data.

    Args:
        name: of the run, as a title.

    Raises:
        UserError: it cannot be written.
    """
    tables = [
        ("Base", report.model and list_model_rows(report.model)),
        ("Run", report.run and list_run_rows(report.run)),
        ("Memory of the fullest card", report.memory and list_memory_rows(report.memory)),
    ]
    page = render_package_file(
        "validation.html.jinja",
        name=name,
        report=report,
        verdict=summarize_validation(report),
        tables=tables,
        sources=[(source, list_source_rows(source, seq_len)) for source in report.sources],
        seq_len=seq_len,
    )
    write_atomically(path, page, private=True)
