"""``report.html``: a finished run on one self-contained page (``train.report_page``).

Numbers come from ``metrics.jsonl``, the description of the run from its ``RunSummary``, the
configuration from ``config.yaml``.
"""

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from dist_peft.core.errors import UserError
from dist_peft.store.writer import write_atomically
from dist_peft.train.attention_record import FusionAttention
from dist_peft.train.metrics import format_byte_count
from dist_peft.train.plots import (
    PLOTS,
    draw_bars,
    draw_heat_maps,
    draw_plot,
    list_eval_points,
    list_nonfinite_steps,
)
from dist_peft.train.report_page import Picture, ReportSection, render_page
from dist_peft.train.run_summary import Row, RunSummary
from dist_peft.train.step_metrics import METRICS_FILE, SCORE_TITLES, StepMetrics, read_metrics

__all__ = ["list_outcome_rows", "write_plots", "write_report", "write_task_report"]


def write_report(
    run_dir: Path, summary: RunSummary, sections: Sequence[ReportSection] = ()
) -> Path:
    """Write ``run_dir/report.html`` and return its path.

    Reads ``metrics.jsonl``, ``fusion_attention.json`` and ``config.yaml`` of ``run_dir``; a part
    whose file or numbers do not exist is left out.

    Raises:
        UserError: a file is damaged, or the disk is full.
    """
    records = read_metrics(run_dir / METRICS_FILE)
    pictures = _draw_pictures(records)
    if summary.layer_norms:
        title, norms = "What was trained, by block", dict(summary.layer_norms)
        pictures.append(Picture(draw_bars(title, summary.norm_meaning, norms, "norms")))
    if (attention := FusionAttention.read_json(run_dir)) is not None:
        pictures.append(_draw_attention(attention))
    return _write_page(
        run_dir,
        headline=_format_headline(records),
        tables=[
            ("Setup", _list_setup_rows(summary)),
            ("Outcome", list_outcome_rows(records, summary.ranks)),
            ("Data", summary.data),
            ("Environment", summary.environment),
        ],
        pictures=pictures,
        sections=[*_list_sample_sections(records), *sections],
    )


def _list_sample_sections(records: Sequence[StepMetrics]) -> list[ReportSection]:
    """Return the text generated before and after training; nothing without samples."""
    before = next((r.sample_texts_before for r in records if r.sample_texts_before), None) or []
    after = next((r.sample_texts for r in reversed(records) if r.sample_texts), None) or []
    texts: list[Row] = []
    for number in range(max(len(before), len(after))):
        sides = [samples[number] for samples in (before, after) if number < len(samples)]
        texts.append((f"Prompt {number + 1}", sides[-1].get("prompt", "")))
        for title, samples in (("Before training", before), ("After training", after)):
            if number < len(samples):
                texts.append((title, samples[number].get("text", "")))
        texts.append(("In the data", sides[-1].get("expected", "")))
    title = "Samples, greedy, before and after training"
    return [ReportSection(title, texts=tuple(texts))] if texts else []


def write_task_report(
    run_dir: Path, summary: RunSummary, tasks: Mapping[str, Sequence[StepMetrics]]
) -> Path:
    """Write ``run_dir/report.html`` about several tasks, by name; return its path."""
    return _write_page(
        run_dir,
        headline=f"An adapter for each of {_format_plural(len(tasks), 'task')}; its curves "
        "are in the report of its own directory, tasks/NAME.",
        tables=[
            ("Setup", _list_setup_rows(summary)),
            *((name, list_outcome_rows(own, summary.ranks)) for name, own in tasks.items()),
            ("Environment", summary.environment),
        ],
    )


def _write_page(run_dir: Path, **parts: Any) -> Path:
    config, path = run_dir / "config.yaml", run_dir / "report.html"
    text = config.read_text(encoding="utf-8") if config.exists() else None
    write_atomically(path, render_page(run_dir.resolve().name, config=text, **parts))
    return path


def _format_headline(records: Sequence[StepMetrics]) -> str:
    """Return the run in one sentence."""
    if not records:
        return "No step has been recorded."
    points = list_eval_points(records)
    steps = _format_plural(records[-1].step, "step")
    if len(points) > 1:
        (start, before), (end, after) = points[0], points[-1]
        return f"Held-out loss {before:.4f} at step {start:,}, {after:.4f} at step {end:,}."
    if len(records) == 1:
        return f"Training loss {records[0].loss:.4f} after {steps}."
    return f"Training loss {records[0].loss:.4f} at first, {records[-1].loss:.4f} after {steps}."


def _list_setup_rows(summary: RunSummary) -> list[Row]:
    return [
        ("Base model", summary.model),
        ("Base storage", summary.base_storage),
        ("Adapter", summary.adapter),
        ("Engine", summary.engine),
        ("Ranks", str(summary.ranks)),
        *summary.facts,
    ]


def list_outcome_rows(records: Sequence[StepMetrics], ranks: int = 1) -> list[Row]:
    """Return the results of a run as rows of a table."""
    if not records:
        return [("Steps", "0")]
    first, last, points = records[0], records[-1], list_eval_points(records)
    seconds = sum(_training_seconds(r) for r in records)
    tokens = sum(r.tokens for r in records)
    rows = [
        ("Steps", f"{last.step:,}"),
        ("Target tokens", f"{tokens:,}"),
        ("Time in steps", str(timedelta(seconds=round(seconds)))),
        ("Training loss, first step", f"{first.loss:.4f}"),
    ]
    if len(records) > 1:
        rows.append(("Training loss, last step", f"{last.loss:.4f}"))
    for title, steps in (
        ("Loss spikes", [r.step for r in records if r.spike is not None]),
        ("Steps not finite, without update", list_nonfinite_steps(records)),
    ):
        if steps:
            rows.append((title, f"{len(steps)} (step{_format_some_steps(steps)})"))
    if last.domain_loss is not None:
        rows.append(
            (
                "Domains",
                f"loss {last.domain_loss:.4f}, accuracy {last.domain_accuracy:.1%} in the last "
                f"step; factor of the reversed gradient {last.reversal_strength:.2f}",
            )
        )
    if last.sampling_eps is not None:
        shares = [r.sampling_replaced or 0.0 for r in records]
        rows.append(
            (
                "Inputs replaced by predictions",
                f"{statistics.fmean(shares):.1%} on average, {shares[-1]:.1%} in the last step",
            )
        )
    if points:
        rows.append((f"Held-out loss at step {points[0][0]:,}", f"{points[0][1]:.4f}"))
    if len(points) > 1:
        rows.append((f"Held-out loss at step {points[-1][0]:,}", f"{points[-1][1]:.4f}"))
        best = min(points, key=lambda point: point[1])
        if best not in (points[0], points[-1]):
            rows.append(("Best held-out loss", f"{best[1]:.4f} at step {best[0]:,}"))
    for name, title in SCORE_TITLES.items():
        ends = (getattr(first, f"eval_{name}_before"), getattr(last, f"eval_{name}"))
        for share, step in zip(ends, (first.step - 1, last.step), strict=True):
            if share is not None:
                rows.append((f"Held-out {title} at step {step:,}", f"{share:.4f}"))
    speed = statistics.median(r.tokens_per_s for r in records)
    gathered = statistics.median(r.bytes_gathered for r in records)
    return [
        *rows,
        ("Throughput (median)", f"{speed:,.0f} targets/s"),
        *_list_rank_rows(records, speed, ranks),
        ("Peak memory (fullest rank)", format_byte_count(max(r.mem_peak for r in records))),
        ("Gathered per step and rank", format_byte_count(gathered)),
    ]


def _list_rank_rows(records: Sequence[StepMetrics], speed: float, ranks: int) -> list[Row]:
    """Return throughput by rank, the straggler share and reserved memory, where they exist."""
    rows: list[Row] = []
    ends = [(r.rank_rate_min, r.rank_rate_median, r.rank_rate_max) for r in records]
    rates = [own for own in ends if None not in own]
    if rates:
        low, middle, high = (statistics.median(own) for own in zip(*rates, strict=True))
        text = f"{low:,.0f} / {middle:,.0f} / {high:,.0f} targets/s"
        rows.append(("Throughput by rank, min / median / max", text))
    elif ranks > 1:
        rows.append(("Throughput of a rank (median)", f"{speed / ranks:,.0f} targets/s"))
    if slowest := [r.slowest_rank for r in records if r.slowest_rank is not None]:
        rank, times = Counter(slowest).most_common(1)[0]
        rows.append(("Slowest rank", f"{rank}, in {times / len(slowest):.0%} of the steps"))
    if shares := [r.straggler_share for r in records if r.straggler_share is not None]:
        rows.append(("Straggler share (median)", f"{statistics.median(shares):.1%}"))
    if reserved := [r.mem_reserved for r in records if r.mem_reserved is not None]:
        rows.append(("Reserved by the allocator", format_byte_count(max(reserved))))
    return rows


def _format_some_steps(steps: Sequence[int]) -> str:
    """Return `` 12`` or ``s 12, 57, ...``, to be put after the word step."""
    shown = ", ".join(f"{step:,}" for step in steps[:8])
    return f"{'' if len(steps) == 1 else 's'} {shown}{', ...' if len(steps) > 8 else ''}"


def _training_seconds(record: StepMetrics) -> float:
    if record.seconds is not None:
        return record.seconds
    return record.tokens / record.tokens_per_s if record.tokens_per_s else 0.0


def _format_plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _draw_pictures(records: Sequence[StepMetrics]) -> list[Picture]:
    """Draw the plots whose numbers the records have."""
    if not records:
        return []
    return [
        Picture(
            draw_plot(plot, records),
            draw_plot(plot, records, is_wide=True) if plot.is_wide else "",
        )
        for plot in PLOTS
        if plot.is_shown(records)
    ]


def write_plots(run_dir: Path, directory: Path) -> list[Path]:
    """Write each plot of a run's report to a file of its own, ``NAME.svg``; return their paths.

    Args:
        directory: is made if it is not there; files of these names are replaced.

    Raises:
        UserError: ``metrics.jsonl`` is damaged or has no step, or the files cannot be written.
    """
    records = read_metrics(run_dir / METRICS_FILE)
    if not records:
        raise UserError(f"{run_dir} has no recorded step, so there is nothing to draw")
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make directory {directory}: {error.strerror}") from None
    written = []
    for plot in PLOTS:
        if plot.is_shown(records):
            written.append(directory / f"{plot.name}.svg")
            picture = draw_plot(plot, records, is_wide=plot.is_wide, is_file=True)
            write_atomically(written[-1], picture)
    return written


def _draw_attention(found: FusionAttention) -> Picture:
    """Draw the attention of fusions: one table, or one for each task."""
    title = "Attention to the fused adapters, by layer"
    panels = found.by_task or {"held-out rows": found.attention}
    return Picture(draw_heat_maps(title, found.format_layer_labels(), found.adapters, panels))
