"""Compare finished or running runs: outcomes, configurations, versions and hardware.

Everything is read from the run directories: ``metrics.jsonl``, ``config.yaml``, and ``report.json``
where the run has finished.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dist_peft.app.report_files import read_report_data
from dist_peft.core.agreement import flatten_tree
from dist_peft.core.errors import UserError
from dist_peft.core.redaction import redact_text
from dist_peft.train.metrics import format_byte_count
from dist_peft.train.plots import list_eval_points, smooth_values
from dist_peft.train.step_metrics import METRICS_FILE, StepMetrics, read_metrics

__all__ = ["ComparedRun", "RunOutcome", "compare_settings", "list_outcome_table", "read_runs"]

_NOT_COMPARED = ("save.dir", "resume")
"""Keys that differ between any two runs."""

_NOT_SHOWN = ("Process begun", "Command")
"""Facts that differ between any two runs; the configuration says more than the command."""


@dataclass(frozen=True)
class RunOutcome:
    """Results of a run; None: not measured.

    Attributes:
        steps: optimizer steps done.
        target_tokens: tokens in the loss, over all steps.
        seconds: wall time of the steps.
        training_loss: moving average at the last step, nats per target token.
        held_out_before, held_out_loss: first and last evaluation.
        held_out_best, held_out_best_step: evaluation with the lowest loss.
        tokens_per_s, tokens_per_s_of_a_rank: target tokens, median over the steps.
        straggler_share: see ``train.rank_load``, median.
        mem_peak, mem_reserved: bytes of the fullest rank.
    """

    steps: int
    target_tokens: int
    seconds: float
    training_loss: float
    held_out_before: float | None
    held_out_loss: float | None
    held_out_best: float | None
    held_out_best_step: int | None
    tokens_per_s: float
    tokens_per_s_of_a_rank: float | None
    straggler_share: float | None
    mem_peak: int
    mem_reserved: int | None


@dataclass(frozen=True)
class ComparedRun:
    """A run of a comparison.

    Attributes:
        settings: configuration by key.
        environment: versions, hardware and so on, by label; empty before the run's end.
    """

    name: str
    records: Sequence[StepMetrics]
    settings: Mapping[str, Any]
    environment: Mapping[str, str]
    outcome: RunOutcome


def read_runs(directories: Sequence[Path]) -> list[ComparedRun]:
    """Return the runs, named by their directories, or by their whole paths where names are equal.

    Raises:
        UserError: fewer than two, one that is given twice, is no run, has no step yet, or is
            damaged.
    """
    if len(directories) < 2:
        raise UserError("compare takes two or more run directories")
    resolved = [directory.resolve() for directory in directories]
    for directory in directories:
        if resolved.count(directory.resolve()) > 1:
            raise UserError(f"{directory} is given twice")
    names = [directory.name for directory in resolved]
    if len(set(names)) < len(names):
        names = [str(directory) for directory in directories]
    return [_read_run(*pair) for pair in zip(names, directories, strict=True)]


def _read_run(name: str, directory: Path) -> ComparedRun:
    records = read_metrics(directory / METRICS_FILE)
    if not records:
        tasks = sorted(p.parent.name for p in directory.glob(f"tasks/*/{METRICS_FILE}"))
        hint = f"; it has runs of tasks, such as {directory}/tasks/{tasks[0]}" if tasks else ""
        raise UserError(f"{directory} is no run with a step done: it has no {METRICS_FILE}{hint}")
    environment: dict[str, str] = {}
    ranks = None
    if (directory / "report.json").is_file():
        summary, _ = read_report_data(directory)
        ranks = summary.ranks
        facts = {k: v for k, v in summary.environment if k not in _NOT_SHOWN}
        environment = {"Engine": summary.engine, "Ranks": str(ranks), **facts}
    settings = _read_settings(directory / "config.yaml")
    return ComparedRun(name, records, settings, environment, _measure_outcome(records, ranks))


def _read_settings(file: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{file} cannot be read ({error})") from None
    if not isinstance(tree, dict):
        raise UserError(f"{file} is no configuration: it holds no keys")
    return {k: v for k, v in flatten_tree(tree).items() if k not in _NOT_COMPARED}


def _measure_outcome(records: Sequence[StepMetrics], ranks: int | None) -> RunOutcome:
    points = list_eval_points(records)
    best = min(points, key=lambda point: point[1]) if points else None
    speed = statistics.median(r.tokens_per_s for r in records)
    shares = [r.straggler_share for r in records if r.straggler_share is not None]
    reserved = [r.mem_reserved for r in records if r.mem_reserved is not None]
    return RunOutcome(
        steps=records[-1].step,
        target_tokens=sum(r.tokens for r in records),
        seconds=sum(r.seconds or 0.0 for r in records),
        training_loss=smooth_values([r.loss for r in records], max(1.0, len(records) / 20))[-1],
        held_out_before=points[0][1] if len(points) > 1 else None,
        held_out_loss=points[-1][1] if points else None,
        held_out_best=best and best[1],
        held_out_best_step=best and best[0],
        tokens_per_s=speed,
        tokens_per_s_of_a_rank=speed / ranks if ranks else None,
        straggler_share=statistics.median(shares) if shares else None,
        mem_peak=max(r.mem_peak for r in records),
        mem_reserved=max(reserved) if reserved else None,
    )


def list_outcome_table(runs: Sequence[ComparedRun]) -> list[tuple[str, list[str]]]:
    """Return (label, a text for each run); numbers that no run has are left out."""
    table = []
    for label, name, form in _OUTCOME_ROWS:
        values = [getattr(run.outcome, name) for run in runs]
        if any(value is not None for value in values):
            table.append((label, ["-" if v is None else form(v) for v in values]))
    return table


def compare_settings(runs: Sequence[ComparedRun], field: str) -> list[tuple[str, list[str]]]:
    """Return the keys whose values differ: (key, the value of each run).

    Args:
        field: ``settings`` or ``environment``; a run without any is left out of the judgement.
    """
    tables: list[Mapping[str, Any]] = [getattr(run, field) for run in runs]
    keys = dict.fromkeys(key for table in tables for key in table)
    rows = []
    for key in keys:
        values = [_format_value(table.get(key)) if table else "-" for table in tables]
        if len({value for value, table in zip(values, tables, strict=True) if table}) > 1:
            rows.append((key, values))
    return rows


def _format_value(value: Any) -> str:
    """Format as configurations are written; a key that a run does not have is a dash."""
    if value is None:
        return "-"
    return redact_text(str(value).lower() if isinstance(value, bool) else str(value))


def _format_loss(value: float) -> str:
    return f"{value:.4f}"


def _format_count(value: float) -> str:
    return f"{value:,.0f}"


_OUTCOME_ROWS: tuple[tuple[str, str, Any], ...] = (
    ("Steps", "steps", _format_count),
    ("Target tokens", "target_tokens", _format_count),
    ("Time in steps", "seconds", lambda value: f"{value:,.1f} s"),
    ("Training loss, average at the end", "training_loss", _format_loss),
    ("Held-out loss, first", "held_out_before", _format_loss),
    ("Held-out loss, last", "held_out_loss", _format_loss),
    ("Held-out loss, best", "held_out_best", _format_loss),
    ("Step of the best", "held_out_best_step", _format_count),
    ("Targets/s (median)", "tokens_per_s", _format_count),
    ("Targets/s of a rank (median)", "tokens_per_s_of_a_rank", _format_count),
    ("Straggler share (median)", "straggler_share", lambda value: f"{value:.1%}"),
    ("Peak memory (fullest rank)", "mem_peak", format_byte_count),
    ("Reserved by the allocator", "mem_reserved", format_byte_count),
)
