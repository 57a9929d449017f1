"""The report of ``dist-peft validate`` as lines of a terminal."""

import re
from collections.abc import Iterator

from dist_peft.app.source_report import SourceReport
from dist_peft.app.validation_report import (
    MemoryReport,
    ModelReport,
    RenderedRow,
    RunReport,
    ValidationReport,
)
from dist_peft.core.config.run import RunConfig
from dist_peft.data.length_statistics import draw_histogram
from dist_peft.data.sequence_text import SequencePart, color_sequence
from dist_peft.plan.plan_report import format_byte_count

__all__ = [
    "format_init_summary",
    "format_validation",
    "list_memory_rows",
    "list_model_rows",
    "list_run_rows",
    "list_source_rows",
    "summarize_validation",
]


_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Control characters of the data, which could steer a terminal: all but tab and line break."""

_WIDTH = 28

Row = tuple[str, str]


def format_validation(report: ValidationReport, seq_len: int, *, color: bool) -> list[str]:
    """Return the lines of the report.

    Args:
        seq_len: ``data.seq_len``, which the histograms mark.
        color: mark tokens in the loss by colour instead of ``[[...]]``.
    """
    lines = []
    if report.model is not None:
        lines += [f"base {report.model.path}", *_align(list_model_rows(report.model))]
    for source in report.sources:
        lines += ["", f"{source.key} {source.path}", *_align(list_source_rows(source, seq_len))]
        bars = draw_histogram(source.lengths.histogram, seq_len)
        lines += ["  tokens a document", *(f"    {bar}" for bar in bars)]
    if report.run is not None:
        lines += ["", "run", *_align(list_run_rows(report.run))]
    if report.memory is not None:
        lines += ["", "memory of the fullest card", *_align(list_memory_rows(report.memory))]
    if report.rows:
        marked = "bold green" if color else "[[...]]"
        lines += ["", f"sequences (in the loss: {marked}; || separates documents)"]
        for row in report.rows:
            lines += _format_row(row, color)
    for title, texts in (("warning", report.warnings), ("problem", report.problems)):
        lines += ["", *(f"{title}: {_clean_text(text)}" for text in texts)] if texts else []
    lines += ["", summarize_validation(report)]
    return lines


def list_model_rows(model: ModelReport) -> list[Row]:
    """Return labels and values about the base."""
    positions = "no limit known" if model.positions is None else f"{model.positions:,} positions"
    width = "" if model.hidden_size is None else f" of width {model.hidden_size:,}"
    packed = f", {100 * model.packed_share:.1f} % of the bytes" if model.packed_share else ""
    return [
        ("type", f"{model.kind}, {model.blocks} blocks{width}, {positions}"),
        ("parameters", f"{model.parameters:,}, {model.vocabulary:,} tokens known"),
        ("storage", f"{model.storage}{packed}"),
        ("trainable", f"{model.trainable:,} ({model.adapter})"),
    ]


def list_source_rows(source: SourceReport, seq_len: int) -> list[Row]:
    """Return labels and values about a source, but for its histogram."""
    lengths, read_as = source.lengths, source.read_as
    columns = ", ".join(f"{role}: {column}" for role, column in read_as.columns.items())
    guessed = ", by their names" if read_as.guessed else ""
    rows = [("read as", f"{read_as.format} ({columns}){guessed}")]
    for label, names in (("not used", read_as.unused), ("ignored", read_as.ignored)):
        rows += [(label, ", ".join(names))] if names else []
    if source.template is not None:
        rows.append(("chat template", source.template))
    files = f" of {source.files} files" if source.files > 1 else ""
    rows += [
        ("documents", f"{lengths.documents:,}{files}, {lengths.tokens:,} tokens"),
        (
            "tokens each",
            f"{lengths.shortest:,} to {lengths.longest:,}, median {lengths.median:,.0f}, mean "
            f"{lengths.mean:,.1f}, 95 % have at most {lengths.p95:,.0f}",
        ),
    ]
    if source.target_share is not None:
        rows.append(
            ("in the loss", f"{source.targets:,} tokens, {100 * source.target_share:.1f} %")
        )
    if source.labels:
        rows.append(("labels", ", ".join(f"{label} {n:,}" for label, n in source.labels.items())))
    if source.domain is not None:
        rows.append(("domain", source.domain + ("" if source.labels else ", without labels")))
    rows += list(_list_losses(source, seq_len))
    return [*rows, *(("note", note) for note in source.notes)]


def _list_losses(source: SourceReport, seq_len: int) -> Iterator[Row]:
    """Yield rows about documents that are not used, or not whole."""
    if source.without_target:
        yield "left out", f"{source.without_target:,} without a token in the loss"
    if source.chunks is not None:
        yield "chunks", f"{source.chunks:,} of at most {seq_len:,} tokens"
    elif source.longer:
        text = f"{source.longer:,} of more than data.seq_len {seq_len:,}"
        done = f"{source.cut:,} cut" if source.cut else ""
        dropped = f"{source.dropped:,} dropped" if source.dropped else ""
        done = ", ".join(filter(None, (done, dropped))) or "refused"
        yield "too long", f"{text}: {done}"
    if source.beyond_positions:
        yield "beyond the base", f"{source.beyond_positions:,} longer than the positions it has"


def list_run_rows(run: RunReport) -> list[Row]:
    """Return labels and values about sequences and steps."""
    filled = f", {100 * run.filled:.1f} % of data.seq_len filled" if run.packed else ", not packed"
    epochs = run.steps * run.global_batch / run.sequences_per_epoch
    held_out = f"{run.held_out:,} sequences" if run.held_out else "none (data.eval, data.val_split)"
    return [
        ("training", f"{run.sequences:,} sequences{filled}"),
        ("held out", held_out),
        ("steps", f"{run.steps:,} of {run.global_batch} sequences, {epochs:.2f} epochs"),
    ]


def list_memory_rows(memory: MemoryReport) -> list[Row]:
    """Return labels and values about the planned memory."""
    cards = f"{memory.nodes} x {memory.cards} cards, engine {memory.engine}"
    rows = [("planned for", cards)]
    rows += [(name, format_byte_count(size)) for name, size in memory.items.items()]
    rows.append(("needed", format_byte_count(memory.needed)))
    if memory.limit is not None:
        verdict = "fits" if memory.fits else "DOES NOT FIT"
        rows.append(("card", f"{format_byte_count(memory.limit)}: {verdict}"))
    return rows


def _align(rows: list[Row]) -> list[str]:
    return [f"  {label:<{_WIDTH}}{_clean_text(value)}" for label, value in rows]


def _format_row(row: RenderedRow, color: bool) -> list[str]:
    epoch = "" if row.epoch is None else f" (epoch {row.epoch})"
    label = "" if row.label is None else f", label {row.label}"
    head = f"--- {row.key} row {row.index}{epoch}: {row.tokens} tokens{label}"
    parts = [SequencePart(_clean_text(p.text), p.in_loss, p.begins) for p in row.parts]
    if color:
        return [head, color_sequence(parts)]
    return [
        head,
        "".join(
            f"{' || ' if p.begins else ''}{f'[[{p.text}]]' if p.in_loss else p.text}" for p in parts
        ),
    ]


def _clean_text(text: str) -> str:
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def format_init_summary(
    report: ValidationReport, config: RunConfig, written: str, file: str, start: str
) -> list[str]:
    """Return the lines with which ``dist-peft init`` ends.

    Args:
        written: the files. file: the configuration. start: the command that starts the run.
    """
    lines = [] if report.model is None else _align(list_model_rows(report.model))
    for source in report.sources:
        rows = list_source_rows(source, config.data.seq_len)
        lines += ["", f"{source.key} {source.path}", *_align(rows)]
    if report.run is not None:
        lines += ["", "run", *_align(list_run_rows(report.run))]
    if report.memory is not None:
        rows = [row for row in list_memory_rows(report.memory) if row[0] not in report.memory.items]
        lines += ["", "memory of the fullest card", *_align(rows)]
    lines += ["", *(f"warning: {_clean_text(text)}" for text in report.warnings)]
    return [
        *lines,
        f"wrote {written}",
        f"  look     dist-peft validate --config {file} --rows 3",
        f"  start    {start}",
    ]


def summarize_validation(report: ValidationReport) -> str:
    """Return the verdict as one line."""
    counts = [
        f"{len(texts)} {name}{'' if len(texts) == 1 else 's'}"
        for name, texts in (("problem", report.problems), ("warning", report.warnings))
        if texts
    ]
    is_too_large = report.memory is not None and report.memory.fits is False
    if is_too_large:
        counts.insert(0, "more memory than the card has")
    verdict = "not ready" if report.problems or is_too_large else "ready to train"
    return f"{verdict}{': ' if counts else ''}{', '.join(counts)}"
