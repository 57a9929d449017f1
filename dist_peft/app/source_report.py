"""Report on one data source: how it is read, its lengths, documents cut and left out."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist_peft.core.config.run import DataConfig, DataSource
from dist_peft.data.cache import TokenDocuments
from dist_peft.data.chat_template import ChatTemplate, RenderError
from dist_peft.data.labels import apply_task_labels, list_class_tasks
from dist_peft.data.length_statistics import LengthStatistics, measure_lengths
from dist_peft.data.pieces import (
    DocumentPieces,
    count_piece_targets,
    take_whole_documents,
)
from dist_peft.data.source_description import SourceDescription, describe_source
from dist_peft.data.tokens import Tokenizer, load_token_documents

__all__ = ["PositionLimit", "SourceReport", "report_source"]


@dataclass(frozen=True)
class PositionLimit:
    """Positions that a base was made for; None: no limit is known.

    Attributes:
        extra: positions that the adapter puts in front of each document.
    """

    positions: int | None
    extra: int


@dataclass(frozen=True)
class SourceReport:
    """Facts about one source before a run.

    Attributes:
        key: its configuration key, such as ``data.train[0]``.
        files: that have records.
        lengths: of all documents, before anything is cut.
        targets: tokens in the loss; None for classification.
        labels: documents by label, for classification.
        domain: ``domain`` of the source.
        template: the chat template of conversations; None for other formats.
        without_target: documents without a token in the loss, which are left out.
        longer: documents of more than ``data.seq_len`` tokens.
        cut, dropped: of these, by ``data.too_long``; dropped ones include cut ones without a target
            token left.
        chunks: number of chunks that plain text is split into.
        beyond_positions: documents, as they are used, longer than the base's positions.
        notes: of the records: columns not used, records left out, ...
    """

    key: str
    path: str
    read_as: SourceDescription
    files: int
    lengths: LengthStatistics
    targets: int | None
    without_target: int
    longer: int
    cut: int
    dropped: int
    beyond_positions: int
    chunks: int | None = None
    labels: dict[str, int] = field(default_factory=dict)
    domain: str | None = None
    template: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def target_share(self) -> float | None:
        """Share of all tokens that are in the loss."""
        return None if self.targets is None else self.targets / self.lengths.tokens


def report_source(
    config: DataConfig, name: str, number: int, tokenizer: Tokenizer, limit: PositionLimit
) -> SourceReport:
    """Read and tokenize a source, or take it from the cache, and describe it.

    Args:
        name, number: ``train`` or ``eval``, and the index there.

    Raises:
        UserError: the source cannot be read.
    """
    source: DataSource = getattr(config, name)[number]
    key = f"data.{name}[{number}]"
    if config.is_classification:
        source, _ = apply_task_labels(source, list_class_tasks(config), key)
    read_as = describe_source(source, key)
    documents = load_token_documents(config, source, tokenizer, key, logs_notes=False)
    lengths = np.diff(documents.offsets)
    targets = None
    if not config.is_classification:
        targets = count_piece_targets([documents], take_whole_documents(documents))
    used, cut, dropped = _fit_lengths(config, documents, lengths, targets)
    edges = [config.seq_len] if limit.positions is None else [config.seq_len, limit.positions]
    positions = np.inf if limit.positions is None else limit.positions - limit.extra
    return SourceReport(
        key=key,
        path=source.path,
        read_as=read_as,
        files=len(documents.files),
        lengths=measure_lengths(lengths, *edges),
        targets=None if targets is None else int(targets.sum(dtype=np.int64)),
        without_target=0 if targets is None else int((targets == 0).sum()),
        longer=int((lengths > config.seq_len).sum()),
        cut=cut,
        dropped=dropped,
        beyond_positions=int((used > positions).sum()),
        chunks=int((-(-lengths // config.seq_len)).sum()) if documents.is_text else None,
        labels=_count_labels(documents, source.labels),
        domain=source.domain,
        template=_describe_template(config, documents, read_as, tokenizer),
        notes=documents.notes,
    )


def _fit_lengths(
    config: DataConfig,
    documents: TokenDocuments,
    lengths: NDArray[np.int64],
    targets: NDArray[np.int32] | None,
) -> tuple[NDArray[np.int64], int, int]:
    """Return the lengths of documents as they are used, and how many are cut and dropped."""
    is_long = lengths > config.seq_len
    if documents.is_text:
        return np.minimum(lengths, config.seq_len), 0, 0
    if config.too_long == "drop":
        return lengths[~is_long], 0, int(is_long.sum())
    if config.too_long != "truncate":
        return lengths, 0, 0
    short = np.minimum(lengths, config.seq_len)
    dropped = 0
    if targets is not None:
        whole = take_whole_documents(documents)
        left = count_piece_targets(
            [documents], DocumentPieces(whole.source, whole.start, short.astype(np.int64))
        )
        dropped = int(((left == 0) & (targets > 0)).sum())
    return short, int(is_long.sum()), dropped


def _count_labels(documents: TokenDocuments, labels: list[str]) -> dict[str, int]:
    if not labels:
        return {}
    counts = np.bincount(documents.classes, minlength=len(labels)).tolist()
    return dict(zip(labels, counts, strict=True))


def _describe_template(
    config: DataConfig, documents: TokenDocuments, read_as: SourceDescription, tokenizer: Any
) -> str | None:
    """Return whose chat template the conversations of a source use; None if it has none."""
    if read_as.format != "chat" and documents.chat_template is None:
        return None
    if config.chat_template is not None:
        whose = "data.chat_template"
    elif documents.chat_template is not None:
        return "this project's, since the tokenizer has none (<|role|>, content, eos)"
    else:
        whose = "the tokenizer's"
    try:
        marks = ChatTemplate(tokenizer).marks_assistant_text()
    except RenderError:
        return whose
    return f"{whose}, {'which marks' if marks else 'which does not mark'} the assistant's text"
