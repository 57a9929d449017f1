"""``report.html``: a finished run on one self-contained page.

Images are inline, there is no script and no link to elsewhere; the page follows the reader's light
or dark setting. Numbers come from ``metrics.jsonl``, the description of the run from its
``RunSummary``, the configuration from ``config.yaml``.
"""

import base64
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Self

from jinja2 import Environment, StrictUndefined

from dist_peft.core.config.run import RunConfig
from dist_peft.core.redaction import redact_text
from dist_peft.model.skeleton import parse_torch_dtype
from dist_peft.quant.codec import make_codec
from dist_peft.store.writer import write_atomically
from dist_peft.train.fusion_attention import FusionAttention
from dist_peft.train.metrics import format_byte_count
from dist_peft.train.plots import (
    PLOTS,
    PlotSpec,
    Theme,
    draw_heat_maps,
    draw_plot_in_themes,
    list_eval_points,
    list_nonfinite_steps,
)
from dist_peft.train.step_metrics import METRICS_FILE, SCORE_TITLES, StepMetrics, read_metrics

__all__ = ["ReportSection", "RunSummary", "write_report", "write_task_report"]

Row = tuple[str, str]


@dataclass(frozen=True)
class RunSummary:
    """Facts about a run that are not in its metrics.

    Attributes:
        model: path or hub id of the base.
        adapter: method and its main settings.
        base_storage: how the frozen linears are stored.
        engine: kind of the engine.
        ranks: number of processes.
        facts: further rows of the summary table, such as parameter counts.
    """

    model: str
    adapter: str
    base_storage: str
    engine: str
    ranks: int
    facts: tuple[Row, ...] = ()

    @classmethod
    def from_config(
        cls, config: RunConfig, *, engine: str, ranks: int, facts: Iterable[Row] = ()
    ) -> Self:
        """Build from a run's configuration; ``engine``: the resolved kind where the config says
        auto."""
        adapter, base = config.adapter, config.base
        chosen = adapter.model_dump(exclude={"kind"}, exclude_defaults=True)
        always = adapter.model_dump(include={"r", "alpha"})
        settings = ", ".join(
            _format_setting(key, value) for key, value in (always | chosen).items()
        )
        codec = make_codec(base.quant, parse_torch_dtype(base.compute_dtype))
        return cls(
            model=redact_text(base.path),
            adapter=redact_text(f"{adapter.kind} ({settings})" if settings else adapter.kind),
            base_storage=codec.describe_storage(),
            engine=engine,
            ranks=ranks,
            facts=tuple(facts),
        )


@dataclass(frozen=True)
class ReportSection:
    """An optional part of the report.

    Attributes:
        title: heading.
        rows: a table of (label, value).
        texts: (label, text) blocks, shown with their line breaks.
    """

    title: str
    rows: tuple[Row, ...] = ()
    texts: tuple[Row, ...] = ()


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
    plots = [_inline_plot(plot, records) for plot in PLOTS] if records else []
    if (attention := FusionAttention.read_json(run_dir)) is not None:
        plots.append(_inline_attention_maps(attention))
    return _write_page(
        run_dir,
        headline=_format_headline(records),
        tables=[("Setup", _list_setup_rows(summary)), ("Outcome", _list_outcome_rows(records))],
        plots=plots,
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
            *((name, _list_outcome_rows(records)) for name, records in tasks.items()),
        ],
        plots=[],
        sections=(),
    )


def _write_page(run_dir: Path, **parts: object) -> Path:
    config, path = run_dir / "config.yaml", run_dir / "report.html"
    page = _TEMPLATE.render(
        name=run_dir.resolve().name,
        written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        config=config.read_text(encoding="utf-8") if config.exists() else None,
        **parts,
    )
    write_atomically(path, page)
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


def _list_outcome_rows(records: Sequence[StepMetrics]) -> list[Row]:
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
        ("Peak memory (fullest rank)", format_byte_count(max(r.mem_peak for r in records))),
        ("Gathered per step and rank", format_byte_count(gathered)),
    ]


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


def _format_setting(key: str, value: object) -> str:
    """Format a setting as ``r 16``, ``use_dora``, ``target_modules q_proj v_proj``."""
    if value is True:
        return key
    if isinstance(value, list):
        value = " ".join(map(_format_list_item, value))
    return f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}"


def _format_list_item(value: object) -> str:
    """Format an item of a list; a section by its name or path."""
    if isinstance(value, dict):
        value = value.get("name") or value.get("path") or value
    return str(value)


def _inline_plot(plot: PlotSpec, records: Sequence[StepMetrics]) -> dict[str, str]:
    """Draw the plot in both themes as data URIs."""
    inline = _encode_images(draw_plot_in_themes(plot, records))
    return {"title": f"{plot.title}: {plot.unit}", "name": plot.name, **inline}


def _inline_attention_maps(found: FusionAttention) -> dict[str, str]:
    """Draw the attention as ``_inline`` does: one table, or one for each task."""
    title = "Attention to the fused adapters, by layer"
    panels = found.by_task or {"held-out rows": found.attention}
    paint = partial(draw_heat_maps, title, found.format_layer_labels(), found.adapters, panels)
    inline = _encode_images({"light": paint("light"), "dark": paint("dark")})
    return {"title": title, "name": "fusion_attention", **inline}


def _encode_images(images: Mapping[Theme, bytes]) -> dict[str, str]:
    prefix = "data:image/png;base64,"
    return {theme: prefix + base64.b64encode(image).decode() for theme, image in images.items()}


_TEMPLATE = Environment(
    autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
).from_string("""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{ name }}: training report</title>
<style>
:root { --page: #f5f6f7; --card: #ffffff; --ink: #22282d; --soft: #5c666e; --rule: #e3e6e8; }
@media (prefers-color-scheme: dark) {
  :root { --page: #14171a; --card: #1c2024; --ink: #e2e7ea; --soft: #9aa5ad; --rule: #343b41; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1rem 3rem; max-width: 64rem; background: var(--page);
       color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
h1 { margin: 0; font-size: 1.7rem; overflow-wrap: anywhere; }
h2 { margin: 0 0 .6rem; font-size: 1.1rem; }
h3 { margin: 1rem 0 .3rem; font-size: .95rem; color: var(--soft); }
header p, footer p { margin: .3rem 0 1.5rem; color: var(--soft); }
section, details { margin: 1rem 0; padding: 1rem 1.25rem; background: var(--card);
                   border: 1px solid var(--rule); border-radius: 8px; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr));
        gap: 1rem; margin: 1rem 0; }
.pair > section { margin: 0; }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem 0; border-top: 1px solid var(--rule); vertical-align: top; }
tr:first-child > * { border-top: 0; }
th { padding-right: 1rem; text-align: left; font-weight: normal; color: var(--soft); }
td { text-align: right; overflow-wrap: anywhere; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr));
         gap: .5rem; }
.plots picture:first-child { grid-column: 1 / -1; }
img { display: block; width: 100%; height: auto; }
@media (max-width: 600px) {
  .plots picture:first-child { overflow-x: auto; }
  .plots picture:first-child img { width: 700px; max-width: none; }
}
pre { margin: 0; padding: .75rem; overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere;
      background: var(--page); border-radius: 6px; font: .85rem/1.5 ui-monospace, monospace; }
summary { cursor: pointer; font-size: 1.1rem; font-weight: bold; }
details pre { margin-top: .8rem; }
</style>
</head>
<body>
<header>
<h1>{{ name }}</h1>
<p>{{ headline }}</p>
</header>
<div class="pair">
{% for title, rows in tables %}
<section><h2>{{ title }}</h2>
<table>
{% for label, value in rows %}
<tr><th scope="row">{{ label }}</th><td>{{ value }}</td></tr>
{% endfor %}
</table></section>
{% endfor %}
</div>
{% if plots %}
<section class="plots" aria-label="Curves">
{% for plot in plots %}
<picture><source media="(prefers-color-scheme: dark)" srcset="{{ plot.dark }}">
<img alt="{{ plot.title }}" src="{{ plot.light }}"></picture>
{% endfor %}
</section>
{% endif %}
{% for section in sections %}
<section><h2>{{ section.title }}</h2>
{% if section.rows %}
<table>
{% for label, value in section.rows %}
<tr><th scope="row">{{ label }}</th><td>{{ value }}</td></tr>
{% endfor %}
</table>
{% endif %}
{% for label, text in section.texts %}
<h3>{{ label }}</h3>
<pre>{{ text }}</pre>
{% endfor %}
</section>
{% endfor %}
{% if config is not none %}
<details><summary>Resolved configuration</summary>
<pre>{{ config }}</pre>
</details>
{% endif %}
<footer><p>Written {{ written }} by dist_peft.</p></footer>
</body>
</html>
""")
