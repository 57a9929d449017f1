"""The configuration that ``dist-peft init`` proposes for a base and a data file.

Defaults follow "LoRA Without Regret" (Schulman et al., 2025): LoRA on all linears, rank 32, alpha
32, ten times the learning rate of full fine-tuning. The rest comes from the files: the format and
columns of the records, ``seq_len`` from the longest document and the base's positions, a held-out
split, the sequences of a step from their number. The proposal is validated before it is written.
"""

import datetime
import json
import re
import tempfile
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from dist_peft.app.package_files import render_package_file
from dist_peft.app.resolved_config import resolve_preview
from dist_peft.app.source_report import PositionLimit, SourceReport, report_source
from dist_peft.app.validation import validate_run
from dist_peft.app.validation_report import ValidationReport
from dist_peft.core.config.io import load_config, parse_config
from dist_peft.core.config.run import DataSource, RunConfig
from dist_peft.core.errors import UserError
from dist_peft.data.chat_date import freeze_template_date
from dist_peft.data.files import open_source, read_records
from dist_peft.data.record_fields import get_column_value
from dist_peft.model.hub import load_tokenizer, read_json_object
from dist_peft.plan.cluster import Cluster
from dist_peft.plan.planned_model import PlannedModel, build_planned_model

__all__ = ["InitRequest", "propose_config", "state_steps", "validate_text"]

_RANK = 32
_SPLIT, _MOST_HELD_OUT, _FEWEST_RECORDS = 0.05, 1000, 20
_LONGEST = 4096
"""Most tokens of a proposed sequence: longer ones need a reason, and memory."""

_SMALL_BASE = 10**9
"""Parameters below which 16 bits fit everywhere."""

_MOST_LABELS = 50
_BATCH, _FEWEST_STEPS = 16, 8
"""Sequences of a step, and steps of an epoch below which it is halved."""


@dataclass(frozen=True)
class InitRequest:
    """A base, data and wishes of the user.

    Attributes:
        held_out: path of held-out data; None: split off.
        columns: role -> column. labels: of a classifier. classify: read the labels from the data.
        ranks: cards of all nodes.
        start: the command line that starts the run.
    """

    base: str
    data: str
    file: Path
    save_dir: str
    held_out: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    classify: bool = False
    seq_len: int | None = None
    ranks: int = 1
    start: str = ""

    @property
    def is_classifier(self) -> bool:
        return self.classify or bool(self.labels)


def propose_config(request: InitRequest) -> str:
    """Return a commented configuration as YAML.

    Raises:
        UserError: the base or the data cannot be used, with the key that a setting would have.
    """
    source = _describe_source(request)
    head = {"head": "classifier"} if request.is_classifier else {}
    draft = parse_config(
        {"base": {"path": request.base, **head}, "data": {"train": [source]}}, "dist-peft init"
    )
    preview = resolve_preview(draft)
    planned = build_planned_model(draft)
    tokenizer = load_tokenizer(preview.directory, False)
    tokenizer, _ = freeze_template_date(tokenizer, datetime.date.today())
    limit = PositionLimit(planned.skeleton.max_positions, 0)
    found = report_source(draft.data, "train", 0, tokenizer, limit)
    if found.read_as.guessed:
        source["columns"] = found.read_as.columns
    values = _choose_lengths(request, draft, found, limit)
    values |= _choose_storage(planned, preview.directory)
    values |= _choose_steps(request, found, values)
    return render_package_file(
        "run.yaml.jinja",
        yaml=_format_yaml,
        title=_write_on_one_line(f"LoRA of {request.base} on {request.data}"),
        file=_write_on_one_line(str(request.file)),
        start=_write_on_one_line(request.start),
        save_dir=request.save_dir,
        base=request.base,
        head=request.is_classifier,
        rank=_RANK,
        source=source,
        about_source=_write_on_one_line(_describe_reading(found)),
        held_out=request.held_out,
        **values,
    )


def validate_text(
    text: str, cluster: Cluster, *, has_limit: bool
) -> tuple[RunConfig, ValidationReport]:
    """Return the configuration in ``text`` and its report.

    Raises:
        UserError: it has a problem.
    """
    with tempfile.TemporaryDirectory(prefix="dist_peft_init") as directory:
        file = Path(directory) / "run.yaml"
        file.write_text(text, encoding="utf-8")
        config = load_config(file)
    report = validate_run(config, cluster, 0, has_limit=has_limit)
    if report.problems:
        raise UserError(
            "the proposed configuration would not run, so nothing is written: "
            + "; ".join(report.problems)
        )
    return config, report


def state_steps(text: str, steps: int) -> str:
    """Return ``text`` with the counted steps of an epoch in place of the estimated ones."""
    return re.sub(r"# one epoch, about [\d,]+ steps", f"# one epoch, {steps:,} steps", text)


# -- the source ------------------------------------------------------------------------------------


def _describe_source(request: InitRequest) -> dict[str, Any]:
    """Return the entry of ``data.train``."""
    source: dict[str, Any] = {"path": request.data}
    if request.is_classifier:
        source["format"] = "classification"
    if request.columns:
        source["columns"] = dict(request.columns)
    if request.is_classifier:
        source["labels"] = list(request.labels) or _read_labels(request)
    return source


def _read_labels(request: InitRequest) -> list[str]:
    """Return the different values of the label column, sorted."""
    column = request.columns.get("label", "label")
    opened = open_source(DataSource(path=request.data), "--data")
    found: set[str] = set()
    for place, record in read_records(opened, None):
        value = get_column_value(record, column)
        if not isinstance(value, str | int | bool):
            raise UserError(
                f"{place} has no label in column {column} (it has {', '.join(record)}); name the "
                "column with --column label=NAME"
            )
        found.add(value if isinstance(value, str) else json.dumps(value))
        if len(found) > _MOST_LABELS:
            some = ", ".join(islice(sorted(found), 3))
            raise UserError(
                f"column {column} of {request.data} has more than {_MOST_LABELS} values ({some}, "
                "...): these are no labels; name the column with --column label=NAME"
            )
    if len(found) < 2:
        raise UserError(
            f"column {column} of {request.data} has {len(found)} value; a classifier needs two"
        )
    return sorted(found)


def _describe_reading(found: SourceReport) -> str:
    columns = ", ".join(f"{role}: {column}" for role, column in found.read_as.columns.items())
    unused = f"; not used: {', '.join(found.read_as.unused)}" if found.read_as.unused else ""
    return (
        f"{found.lengths.documents:,} records, read as {found.read_as.format} ({columns}){unused}"
    )


# -- choices ---------------------------------------------------------------------------------------


def _choose_lengths(
    request: InitRequest, draft: RunConfig, found: SourceReport, limit: PositionLimit
) -> dict[str, Any]:
    """Choose ``seq_len``, and whether longer documents are cut."""
    longest = found.lengths.longest
    most = min(_LONGEST, limit.positions or _LONGEST)
    if found.chunks is not None:
        size = request.seq_len or min(most, 2048)
        about = "plain text is split into chunks of so many tokens"
        return {"seq_len": size, "about_lengths": about, "truncates": ""}
    size = request.seq_len or max(64, 1 << (longest - 1).bit_length())
    size = size if request.seq_len else min(size, most)
    documents = f"documents have {found.lengths.shortest:,} to {longest:,} tokens"
    truncates = ""
    if longest > size:
        truncates = "longer documents lose their end"
        documents += f"; the base has {limit.positions:,} positions" if limit.positions else ""
    return {"seq_len": size, "about_lengths": documents, "truncates": truncates}


def _choose_storage(planned: PlannedModel, directory: Path) -> dict[str, Any]:
    """Choose ``base.quant``."""
    parameters = sum(_multiply(spec.shape) for spec in planned.skeleton.tensors.values())
    about = {"about_base": f"{planned.skeleton.model_config.model_type}, {parameters:,} parameters"}
    if "quantization_config" in read_json_object(directory / "config.json"):
        return {**about, "quant": "packed", "why_unquantized": ""}
    if parameters < _SMALL_BASE:
        return {**about, "quant": "null", "why_unquantized": "a small base: kept in 16 bits"}
    return {**about, "quant": "nf4", "why_unquantized": ""}


def _multiply(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def _choose_steps(
    request: InitRequest, found: SourceReport, values: dict[str, Any]
) -> dict[str, Any]:
    """Choose the split, the sequences of a step and the steps between evaluations.

    Raises:
        UserError: fewer sequences than cards.
    """
    records, split, held = found.lengths.documents, 0.0, 0
    if request.held_out is None and records >= _FEWEST_RECORDS and found.chunks is None:
        split = _SPLIT if records * _SPLIT <= _MOST_HELD_OUT else _MOST_HELD_OUT
        held = round(records * split) if split < 1 else int(split)
    is_packed = not request.is_classifier
    tokens = found.lengths.tokens * (1 - held / records)
    rows = max(1, round(tokens / values["seq_len"])) if is_packed else records - held
    if rows < request.ranks:
        raise UserError(
            f"{request.data} makes about {rows} sequences of {values['seq_len']} tokens, fewer "
            f"than the {request.ranks} cards: give fewer with --gpus and --nodes"
        )
    batch = _BATCH
    while batch > request.ranks and batch > 1 and rows < batch * _FEWEST_STEPS:
        batch //= 2
    batch = request.ranks * max(1, -(-batch // request.ranks))
    steps = -(-rows // batch)
    return {
        "val_split": f"{split:g}" if split else "",
        "num_held_out": f"{held:,}",
        "global_batch": batch,
        "steps": steps,
        "eval_every": max(1, min(100, steps // 4)),
    }


# -- text ------------------------------------------------------------------------------------------


def _format_yaml(value: Any) -> str:
    """Return a text, a list or a map of texts as YAML on one line."""
    if isinstance(value, list):
        return f"[{', '.join(map(_quote_text, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_quote_text(text)}' for key, text in value.items())}}}"
    return _quote_text(value)


def _quote_text(text: str) -> str:
    """Return ``text`` in quotes, unless YAML reads it as text without; ``${`` is escaped, which
    OmegaConf would take for a reference."""
    is_plain = re.fullmatch(r"(?:[A-Za-z_]|\.{0,2}/)[A-Za-z0-9_./-]*", text)
    if is_plain and isinstance(yaml.safe_load(text), str):
        return text
    escaped = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)
    return json.dumps(escaped, ensure_ascii=False)


def _write_on_one_line(text: str) -> str:
    return " ".join(text.split())
