"""The data of a report, ``report.json``, and the page that is drawn from it.

``metrics.jsonl`` and ``config.yaml``, which the page shows too, are not repeated in it.
"""

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dist_peft.core.errors import UserError
from dist_peft.store.writer import write_atomically
from dist_peft.train.report import write_report
from dist_peft.train.report_page import ReportSection
from dist_peft.train.run_summary import RunSummary

__all__ = ["add_report_section", "read_report_data", "rewrite_report", "write_report_files"]

log = logging.getLogger("dist_peft")

_SUMMARY_TABLES = ("data", "environment", "layer_norms")
"""Fields of a summary that hold rows; earlier versions have none of them."""


def add_report_section(run_dir: Path, section: ReportSection) -> Path:
    """Rewrite the report with one more section, replacing one of the same title.

    A run that has not finished has no report, and one whose directory cannot be written keeps the
    old one; both are logged.

    Raises:
        UserError: ``report.json`` is damaged.
    """
    path = run_dir / "report.json"
    if not path.exists():
        log.info("%s has no report yet: section %r is not added", run_dir, section.title)
        return path
    summary, kept = read_report_data(run_dir)
    kept = [s for s in kept if s.title != section.title]
    try:
        return write_report_files(run_dir, summary, [*kept, section])
    except (OSError, UserError) as error:
        log.warning("the report of %s is not updated: %s", run_dir, error)
        return path


def read_report_data(run_dir: Path) -> tuple[RunSummary, list[ReportSection]]:
    """Return the summary and the sections in ``report.json``.

    Raises:
        UserError: there is none, or it is damaged.
    """
    path = run_dir / "report.json"
    try:
        tree = json.loads(path.read_text())
        summary = tree["summary"]
        tables = {name: _to_label_text_pairs(summary.get(name, [])) for name in _SUMMARY_TABLES}
        tables["facts"] = _to_label_text_pairs(summary["facts"])
        sections = [
            ReportSection(
                s["title"], _to_label_text_pairs(s["rows"]), _to_label_text_pairs(s["texts"])
            )
            for s in tree["sections"]
        ]
        return RunSummary(**{**summary, **tables}), sections
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not readable ({error}); finish the run first") from None


def rewrite_report(run_dir: Path) -> Path:
    """Draw the report of a finished run from its files again; return its path.

    Raises:
        UserError: ``run_dir`` is no run, or a file of it is damaged.
    """
    return write_report(run_dir, *read_report_data(run_dir))


def _to_label_text_pairs(pairs: list[list[Any]]) -> tuple[tuple[Any, Any], ...]:
    return tuple((label, text) for label, text in pairs)


def write_report_files(run_dir: Path, summary: RunSummary, sections: list[ReportSection]) -> Path:
    """Write ``report.json`` and ``report.html``; return the path of the page."""
    tree = {"summary": asdict(summary), "sections": [asdict(s) for s in sections]}
    write_atomically(run_dir / "report.json", json.dumps(tree, indent=1))
    return write_report(run_dir, summary, sections)
