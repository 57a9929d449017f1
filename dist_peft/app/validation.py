"""Everything that can be said about a run without weights: ``dist-peft validate``.

Each part is checked by the code that a run uses, as far as the parts before it allow; a problem of
one part does not hide those of the others::

    base      configuration, header of the files, adapter targets, isolation of packed documents
    sources   files, format, columns, leftovers, lengths, share of targets, cut and dropped records
    run       sequences, split, steps, tokens and positions that the model has
    memory    the plan of one step

Warnings that these log become part of the report.
"""

import datetime
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

from torch import nn

from dist_peft.adapters.protocol import Adapter
from dist_peft.app.data_setup import DataLoaders, check_loaders_fit_model, make_data_loaders
from dist_peft.app.document_isolation import count_packed_tokens
from dist_peft.app.model_setup import build_model
from dist_peft.app.resolved_config import ResolvedConfig, resolve_preview, resolve_preview_files
from dist_peft.app.run_identity import count_total_steps
from dist_peft.app.source_report import PositionLimit, report_source
from dist_peft.app.unused_options import warn_unused_options
from dist_peft.app.validation_report import (
    MemoryReport,
    ModelReport,
    RunReport,
    ValidationReport,
)
from dist_peft.core.config.run import RunConfig
from dist_peft.core.errors import UserError
from dist_peft.core.world import World
from dist_peft.data.chat_date import freeze_template_date
from dist_peft.data.chat_override import override_chat_template
from dist_peft.export.outlook import log_export_outlook
from dist_peft.model.freezing import compute_packed_share
from dist_peft.model.hub import Tokenizer, load_tokenizer
from dist_peft.plan.cluster import Cluster
from dist_peft.plan.planned_model import PlannedModel, build_planned_model
from dist_peft.plan.run_plan import plan_run

__all__ = ["validate_run"]

Found = TypeVar("Found")

_NO_WEIGHTS = (
    "no weights are here: names and shapes of their tensors, and the isolation of packed "
    "documents, were not checked"
)


def validate_run(
    config: RunConfig, cluster: Cluster, rows: int, *, has_limit: bool, plans: bool = True
) -> ValidationReport:
    """Check a run and return the report; problems are in it.

    Args:
        cluster: cards to plan for.
        rows: number of sequences to render of each source.
        has_limit: ``cluster.gpu_memory`` is known; else the memory is planned and not compared.
        plans: plan the memory.
    """
    report = ValidationReport()
    check = partial(_try, report)
    with _collect_warnings(report.warnings):
        preview = check(lambda: resolve_preview(config))
        if preview is None:
            return report
        tokenizer = check(lambda: _load_tokenizer(preview))
        planned = check(lambda: _build_model(preview, report))
        if planned is not None:
            report.model = _describe_model(planned)
            check(lambda: _check_options(planned, cluster, preview.directory))
        if tokenizer is not None:
            limit = None if planned is None else _find_position_limit(planned)
            loaders = _report_data(preview.run, tokenizer, limit, rows, report)
            if loaders is not None and planned is not None:
                extra = planned.adapter.num_extra_positions
                check(lambda: check_loaders_fit_model(loaders, planned.skeleton, extra))
        if plans and planned is not None:
            # last: the traced step changes the model
            report.memory = check(lambda: _plan_memory(planned, cluster, has_limit))
    said = {f"{source.key}: {note}" for source in report.sources for note in source.notes}
    report.warnings = [text for text in report.warnings if text not in said]
    return report


def _try(report: ValidationReport, action: Callable[[], Found]) -> Found | None:
    """Return the result of ``action``; None, with the problem in ``report``, after a UserError."""
    try:
        return action()
    except UserError as error:
        report.add_problem(str(error))
        return None


@contextmanager
def _collect_warnings(into: list[str]) -> Iterator[None]:
    """Append warnings of the log to ``into``, and keep its lines off the terminal."""
    logger = logging.getLogger("dist_peft")
    collector = _Collector(into)
    handlers, propagate = list(logger.handlers), logger.propagate
    logger.handlers, logger.propagate = [collector], False
    try:
        yield
    finally:
        logger.handlers, logger.propagate = handlers, propagate


class _Collector(logging.Handler):
    def __init__(self, into: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._into = into

    def emit(self, record: logging.LogRecord) -> None:
        if (text := record.getMessage()) not in self._into:
            self._into.append(text)


# -- the base --------------------------------------------------------------------------------------


def _load_tokenizer(preview: ResolvedConfig) -> Tokenizer:
    """Load the tokenizer with the template and date that the run would use today."""
    tokenizer = load_tokenizer(preview.directory, preview.run.base.trust_remote_code)
    tokenizer = override_chat_template(tokenizer, preview.run.data.chat_template)
    return freeze_template_date(tokenizer, datetime.date.today())[0]


def _build_model(preview: ResolvedConfig, report: ValidationReport) -> PlannedModel:
    directory = preview.directory
    is_local = Path(preview.run.base.path).expanduser().is_dir()
    if is_local and any(directory.glob("*.safetensors")):
        setup = build_model(
            resolve_preview_files(preview), packed_tokens=count_packed_tokens(preview.run)
        )
        return PlannedModel(setup.config, setup.skeleton, setup.adapter, str(directory))
    planned = build_planned_model(preview.run)
    report.warnings.append(f"{preview.run.base.path}: {_NO_WEIGHTS}")
    return planned


def _describe_model(planned: PlannedModel) -> ModelReport:
    skeleton, config = planned.skeleton, planned.config
    text = skeleton.model_config.get_text_config()
    quant = config.base.quant
    return ModelReport(
        path=config.base.path,
        kind=str(skeleton.model_config.model_type),
        blocks=len(skeleton.blocks),
        hidden_size=getattr(text, "hidden_size", None),
        vocabulary=skeleton.vocabulary_size,
        positions=skeleton.max_positions,
        parameters=sum(_count_numbers(spec.shape) for spec in skeleton.tensors.values()),
        storage="not quantized"
        if quant is None
        else f"{quant.kind}, {quant.bits} bits, in groups of {quant.group_size}",
        packed_share=compute_packed_share(skeleton.model) if quant is not None else 0.0,
        adapter=config.adapter.kind,
        trainable=_count_trainable(skeleton.model),
    )


def _count_numbers(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _count_trainable(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _check_options(planned: PlannedModel, cluster: Cluster, directory: Path) -> None:
    config = planned.config
    world = cluster.make_world(config.engine)
    warn_unused_options(config, world, planned.skeleton.model, "cuda")
    log_export_outlook(config, planned.adapter, planned.skeleton, directory)


def _find_position_limit(planned: PlannedModel) -> PositionLimit:
    adapter: Adapter = planned.adapter
    return PositionLimit(planned.skeleton.max_positions, adapter.num_extra_positions)


# -- data ------------------------------------------------------------------------------------------


def _report_data(
    config: RunConfig,
    tokenizer: Tokenizer,
    limit: PositionLimit | None,
    rows: int,
    report: ValidationReport,
) -> DataLoaders | None:
    """Report each source, then the loaders of the run if all of them can be read."""
    before, limit = len(report.problems), limit or PositionLimit(None, 0)
    for name, sources in (("train", config.data.train), ("eval", config.data.eval)):
        for number in range(len(sources)):
            found = _try(
                report,
                partial(report_source, config.data, name, number, tokenizer, limit),
            )
            if found is not None:
                report.sources.append(found)
    if len(report.problems) > before:
        return None
    loaders = _try(report, lambda: make_data_loaders(config, tokenizer, World()))
    if loaders is None:
        return None
    report.run = _try(report, lambda: _describe_steps(config, loaders))
    _try(report, lambda: report.render_rows(config.data, tokenizer, rows))
    return loaders


def _describe_steps(config: RunConfig, loaders: DataLoaders) -> RunReport:
    steps = count_total_steps(config, loaders)
    loaders.train.check_steps(steps)
    rows = loaders.train.rows
    tokens = [len(rows.get_sequence(i)[0]) for i in range(min(len(rows), 256))]
    return RunReport(
        sequences=len(rows),
        held_out=0 if loaders.eval is None else len(loaders.eval.rows),
        sequences_per_epoch=loaders.train.rows_per_epoch,
        steps=steps,
        global_batch=config.train.global_batch,
        filled=sum(tokens) / (len(tokens) * config.data.seq_len),
        packed=rows.packed,
    )


# -- memory ----------------------------------------------------------------------------------------


def _plan_memory(planned: PlannedModel, cluster: Cluster, has_limit: bool) -> MemoryReport:
    plan = plan_run(planned, cluster)
    items = {item.name: 0 for item in plan.memory.items}
    for item in plan.memory.items:
        items[item.name] += item.bytes
    return MemoryReport(
        nodes=cluster.nodes,
        cards=cluster.gpus_per_node,
        engine=plan.engine,
        needed=plan.memory.total,
        limit=cluster.gpu_memory if has_limit else None,
        items=items,
    )
