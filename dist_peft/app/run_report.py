"""Write a run's report after training; merging and the quickstart add sections.

The report's data apart from ``metrics.jsonl`` and ``config.yaml`` is stored in ``report.json``.
"""

import json
import logging
from dataclasses import asdict
from pathlib import Path

from dist_peft.app.model_card import ADAPTER, write_model_card
from dist_peft.app.model_setup import LoadedModel
from dist_peft.core.config.run import RunConfig
from dist_peft.core.errors import UserError
from dist_peft.core.world import World
from dist_peft.engine import resolve_engine_kind
from dist_peft.model.hub import public_base_name
from dist_peft.model.quantization_origin import read_quantization_origin
from dist_peft.store.writer import write_atomically
from dist_peft.train.metrics import format_byte_count
from dist_peft.train.report import ReportSection, RunSummary, write_report

__all__ = [
    "add_report_section",
    "find_public_base_name",
    "summarize_run",
    "write_run_report",
]

log = logging.getLogger("dist_peft")


def write_run_report(run_dir: Path, summary: RunSummary) -> Path:
    """Write the report of a finished run, and the card of its adapter."""
    if (run_dir / ADAPTER).is_dir() and (run_dir / "config.yaml").is_file():
        write_model_card(run_dir, run_dir / ADAPTER, ADAPTER)
    return _write_report_files(run_dir, summary, [])


def summarize_run(config: RunConfig, built: LoadedModel, world: World) -> RunSummary:
    """Return the facts of a run that its report shows in addition to the metrics."""
    return RunSummary.from_config(
        config,
        engine=resolve_engine_kind(config.engine, world),
        ranks=world.size,
        facts=[
            ("Trained parameters", f"{built.trained:,}"),
            ("Model as stored, all ranks", format_byte_count(built.stored_bytes)),
            ("Read from the base by rank 0", format_byte_count(built.bytes_read)),
        ],
    )


def find_public_base_name(config: RunConfig, built: LoadedModel) -> str:
    """Return the base's public name; of a packed base, that of its unquantized origin."""
    origin = read_quantization_origin(built.setup.directory)
    return str(origin.get("base") or public_base_name(config.base))


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
    try:
        tree = json.loads(path.read_text())
        summary = RunSummary(
            **{**tree["summary"], "facts": _to_label_text_pairs(tree["summary"]["facts"])}
        )
        kept = [
            ReportSection(
                s["title"], _to_label_text_pairs(s["rows"]), _to_label_text_pairs(s["texts"])
            )
            for s in tree["sections"]
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not readable ({error}); finish the run first") from None
    kept = [s for s in kept if s.title != section.title]
    try:
        return _write_report_files(run_dir, summary, [*kept, section])
    except (OSError, UserError) as error:
        log.warning("the report of %s is not updated: %s", run_dir, error)
        return path


def _to_label_text_pairs(pairs: list[list[str]]) -> tuple[tuple[str, str], ...]:
    return tuple((label, text) for label, text in pairs)


def _write_report_files(run_dir: Path, summary: RunSummary, sections: list[ReportSection]) -> Path:
    tree = {"summary": asdict(summary), "sections": [asdict(s) for s in sections]}
    write_atomically(run_dir / "report.json", json.dumps(tree, indent=1))
    return write_report(run_dir, summary, sections)
