"""The report of ``dist-peft validate``: facts, warnings, problems, rendered sequences; as JSON."""

from dataclasses import asdict, dataclass, field
from typing import Any

from dist_peft.app.source_report import SourceReport
from dist_peft.core.config.run import DataConfig
from dist_peft.data.classification import LabelledSequences, load_labelled_sequences
from dist_peft.data.documents import SequenceSet, load_sequence_sets
from dist_peft.data.sequence_text import SequencePart, split_sequence_text
from dist_peft.data.tokens import Tokenizer

__all__ = [
    "MemoryReport",
    "ModelReport",
    "RenderedRow",
    "RunReport",
    "ValidationReport",
]


@dataclass(frozen=True)
class ModelReport:
    """The base and its adapter, without weights.

    Attributes:
        positions: that the base was made for; None: no limit is known.
        parameters: numbers of the base as its model reads them.
        packed_share: share of the model's bytes that are quantized.
        trainable: parameters that the adapter trains.
    """

    path: str
    kind: str
    blocks: int
    hidden_size: int | None
    vocabulary: int
    positions: int | None
    parameters: int
    storage: str
    packed_share: float
    adapter: str
    trainable: int


@dataclass(frozen=True)
class RunReport:
    """Sequences and steps of the run.

    Attributes:
        sequences: of training. held_out: of evaluation.
        sequences_per_epoch: fewer than ``sequences`` with variants of records.
        filled: share of ``data.seq_len`` that the first 256 sequences fill.
    """

    sequences: int
    held_out: int
    sequences_per_epoch: float
    steps: int
    global_batch: int
    filled: float
    packed: bool


@dataclass(frozen=True)
class MemoryReport:
    """Planned memory of the fullest card, in bytes.

    Attributes:
        limit: of a card; None: not known.
        items: parts of ``needed`` by name.
    """

    nodes: int
    cards: int
    engine: str
    needed: int
    limit: int | None
    items: dict[str, int]

    @property
    def fits(self) -> bool | None:
        """Whether it fits; None where the limit is not known."""
        return None if self.limit is None else self.needed <= self.limit


@dataclass(frozen=True)
class RenderedRow:
    """A sequence as text.

    Attributes:
        key: of the source. epoch: of a variant of the record; None without variants.
        label: of a classified record.
    """

    key: str
    index: int
    tokens: int
    parts: list[SequencePart]
    epoch: int | None = None
    label: str | None = None


@dataclass
class ValidationReport:
    """All that is known of a run before it starts; parts that could not be checked are None."""

    model: ModelReport | None = None
    sources: list[SourceReport] = field(default_factory=list)
    run: RunReport | None = None
    memory: MemoryReport | None = None
    rows: list[RenderedRow] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def add_problem(self, text: str) -> None:
        """Add a problem, unless another part has met it already."""
        if text not in self.problems:
            self.problems.append(text)

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain JSON values."""
        tree = asdict(self)
        for source, made in zip(self.sources, tree["sources"], strict=True):
            made["target_share"] = source.target_share
        if self.memory is not None:
            tree["memory"]["fits"] = self.memory.fits
        return tree

    def render_rows(self, config: DataConfig, tokenizer: Tokenizer, count: int) -> None:
        """Add the first ``count`` sequences of each source, of both sides of a split.

        Raises:
            UserError: a source cannot be read alone.
        """
        for name, sources in (("train", config.train), ("eval", config.held_out)):
            if count and sources and config.is_classification:
                for number, labelled in enumerate(
                    load_labelled_sequences(config, sources, tokenizer, name=name)
                ):
                    self.rows += _render_labelled(
                        labelled, f"data.{name}[{number}]", tokenizer, count
                    )
            elif count and sources:
                for number, rows in enumerate(
                    load_sequence_sets(config, sources, tokenizer, name=name)
                ):
                    self.rows += _render_sequences(rows, f"data.{name}[{number}]", tokenizer, count)


def _render_sequences(
    rows: SequenceSet, key: str, tokenizer: Tokenizer, count: int
) -> list[RenderedRow]:
    return [
        RenderedRow(
            key, index, rows.num_tokens(index), split_sequence_text(rows, index, tokenizer), epoch
        )
        for index, epoch in _list_first_rows(rows, count)
    ]


def _render_labelled(
    rows: LabelledSequences, key: str, tokenizer: Tokenizer, count: int
) -> list[RenderedRow]:
    found = []
    for index, epoch in _list_first_rows(rows, count):
        tokens, target, _ = rows.get_sequence(index)
        label = "none" if rows.task is None else rows.task.labels[int(target[0]) - rows.task.start]
        part = SequencePart(str(tokenizer.decode(tokens.tolist())), False)
        found.append(RenderedRow(key, index, len(tokens), [part], epoch, label))
    return found


def _list_first_rows(
    rows: SequenceSet | LabelledSequences, count: int
) -> list[tuple[int, int | None]]:
    """Return the first ``count`` rows: index, and the epoch if records have variants.

    The variants of a row follow it; packed ones need not hold the same records.
    """
    epochs = rows.epoch_ranges
    return [
        (first + place, epoch if len(epochs) > 1 else None)
        for place in range(count)
        for epoch, ((first, stop),) in enumerate(epochs)
        if first + place < stop
    ]
