"""A comparison of runs as text, HTML, SVG and JSON."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dist_peft.app.run_comparison import ComparedRun, compare_settings, list_outcome_table
from dist_peft.core.errors import UserError
from dist_peft.store.writer import write_atomically
from dist_peft.train.plots import draw_overlay
from dist_peft.train.report_page import ComparisonTable, Picture, render_page

__all__ = [
    "check_comparison_file",
    "collect_comparison",
    "format_comparison",
    "list_tables",
    "summarize_comparison",
    "write_comparison",
]


def check_comparison_file(path: Path) -> None:
    """Raise UserError unless a comparison can be written to ``path``."""
    if path.suffix.lower() not in (".html", ".svg"):
        raise UserError(f"--out {path}: a comparison is written as .html or .svg")
    if not path.absolute().parent.is_dir():
        raise UserError(f"--out {path}: {path.parent} is no directory")


def list_tables(runs: Sequence[ComparedRun]) -> list[ComparisonTable]:
    """Return the tables of the comparison; those without a row are left out."""
    names = [run.name for run in runs]
    found = (
        ("Outcome", list_outcome_table(runs)),
        ("Configuration: keys that differ", compare_settings(runs, "settings")),
        ("Environment: facts that differ", compare_settings(runs, "environment")),
    )
    return [ComparisonTable(title, names, rows) for title, rows in found if rows]


def summarize_comparison(runs: Sequence[ComparedRun]) -> str:
    """Return the result in a sentence, with a warning where held-out losses are of other data."""
    scored = [run for run in runs if run.outcome.held_out_loss is not None]
    if not scored:
        return f"{len(runs)} runs; none has a held-out loss."
    best = min(scored, key=lambda run: run.outcome.held_out_loss or math.inf)
    text = f"Lowest held-out loss at the end: {best.outcome.held_out_loss:.4f}, {best.name}."
    data = compare_settings(scored, "settings")
    kept = ("data.eval", "data.val_split", "data.seq_len", "data.loss_on", "base.path")
    changed = [key for key, _ in data if key.startswith(kept)]
    if changed:
        text += f" The runs differ in {', '.join(changed)}: their losses may not be comparable."
    return text


def format_comparison(runs: Sequence[ComparedRun]) -> list[str]:
    """Return lines for a terminal."""
    lines = [summarize_comparison(runs)]
    for table in list_tables(runs):
        rows = [("", list(table.columns)), *table.rows]
        widths = [max(len(row[1][n]) for row in rows) for n in range(len(table.columns))]
        left = max(len(label) for label, _ in rows)
        lines += ["", table.title]
        for label, values in rows:
            cells = (value.rjust(width) for value, width in zip(values, widths, strict=True))
            lines.append("  ".join([f"  {label:<{left}}", *cells]).rstrip())
    return lines


def collect_comparison(runs: Sequence[ComparedRun]) -> dict[str, Any]:
    """Return the comparison for JSON: ``runs`` by name with their outcomes, and differences."""
    return {
        "runs": {run.name: _drop_nonfinite(asdict(run.outcome)) for run in runs},
        "configuration": _by_run(runs, "settings"),
        "environment": _by_run(runs, "environment"),
    }


def _drop_nonfinite(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN: None stands for numbers that are not finite."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in values.items()
    }


def _by_run(runs: Sequence[ComparedRun], field: str) -> dict[str, dict[str, Any]]:
    """Return, for each key that differs, the value of each run by its name."""
    return {
        key: {run.name: getattr(run, field).get(key) for run in runs}
        for key, _ in compare_settings(runs, field)
    }


def write_comparison(runs: Sequence[ComparedRun], path: Path) -> None:
    """Write ``.html``: curves and tables, or ``.svg``: the curves.

    Raises:
        UserError: another ending, no such directory, or it cannot be written.
    """
    check_comparison_file(path)
    records = {run.name: run.records for run in runs}
    if path.suffix.lower() == ".svg":
        write_atomically(path, draw_overlay(records, is_wide=True, is_file=True))
        return
    curves = Picture(draw_overlay(records), draw_overlay(records, is_wide=True))
    page = render_page(
        ", ".join(run.name for run in runs),
        kind="comparison of runs",
        headline=summarize_comparison(runs),
        comparisons=list_tables(runs),
        pictures=[curves],
    )
    write_atomically(path, page)
