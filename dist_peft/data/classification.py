"""Labelled records as sequences, and their batches: one record and one class a sequence.

::

    input_ids       [CLS] a a [SEP] b [SEP] pad pad
    attention_mask    1   1 1   1   1   1    0   0      padding is masked
    token_types       0   0 0   0   1   1    0   0
    labels          [class id]                          one target a sequence: mean over sequences
    domains         [domain id]                         of data.train[].domain
    ranges          [first, stop)                       class ids of the sequence's task

A filler sequence (see ``loader``) attends to its first padding token, since a softmax over no
position is NaN, and has no label.
"""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from dist_peft.core.config.run import DataConfig, DataSource
from dist_peft.data.cache import TokenDocuments
from dist_peft.data.documents import fit_documents, refuse_empty_set
from dist_peft.data.files import RecordPlace
from dist_peft.data.held_out_split import count_side_variants, load_split_documents
from dist_peft.data.labels import ClassTask, apply_task_labels, list_class_tasks, list_domains
from dist_peft.data.loader import Batch, Loader, SingleTask
from dist_peft.data.order import Ranges, describe_epochs
from dist_peft.data.packing import IGNORE
from dist_peft.data.pieces import DocumentPieces, split_by_epoch
from dist_peft.data.tokens import Tokenizer

__all__ = ["LabelledBatch", "LabelledLoader", "LabelledSequences", "load_labelled_sequences"]

_LOG = logging.getLogger("dist_peft")

_NO_TARGET = (IGNORE, 0, 1)
"""Class id and range of a sequence without a label."""


class LabelledSequences(SingleTask):
    """The records of one source; implements ``data.loader.SequenceDataset``.

    Attributes:
        task: task with the classes of the labels; None: the records have no labels.
        domain: id of the domain of the texts (``labels.list_domains``); -1: none.
        fingerprint: sha256 of all records, their order, the task's labels and the domain.
    """

    packed = False
    chat_template = None
    has_conversations = False

    def __init__(
        self,
        documents: TokenDocuments,
        pieces: DocumentPieces,
        task: ClassTask | None,
        *,
        seq_len: int,
        num_variants: int = 1,
        domain: int = -1,
    ) -> None:
        self.seq_len, self.task, self.domain = seq_len, task, domain
        epochs = split_by_epoch([documents], pieces, [num_variants])
        self._epoch_ends = np.cumsum([len(each) for each in epochs]).tolist()
        if num_variants > 1:
            start, length = (
                np.concatenate([getattr(each, name) for each in epochs])
                for name in ("start", "length")
            )
            pieces = DocumentPieces(np.zeros(len(start), np.uint8), start, length)
        self._documents, self._pieces = documents, pieces
        self._numbers = np.searchsorted(documents.offsets, pieces.start)
        digest = hashlib.sha256(documents.digest.encode())
        digest.update(pieces.start.tobytes())
        digest.update(pieces.length.tobytes())
        # without the task's name, which may be that of a file: the records may be moved
        labels = ((), 0) if task is None else (task.labels, task.start)
        digest.update(repr(labels if domain < 0 else (*labels, domain)).encode())
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._pieces)

    @property
    def epoch_ranges(self) -> list[Ranges]:
        return [[each] for each in pairwise([0, *self._epoch_ends])]

    def num_targets(self, index: int) -> int:
        """Return 1: a sequence has one class; 0 without labels."""
        return int(self.task is not None)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return int(self._pieces.length.max())

    @property
    def largest_token(self) -> int:
        return self._documents.largest_token

    def list_records(self, index: int) -> list[tuple[int, RecordPlace]]:
        """Return source 0 and the place of record ``index``."""
        return [(0, self._documents.find_place(int(self._pieces.start[index])))]

    def get_sequence(self, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return tokens [T], target [4], token types [T].

        The target is class id, its task's first and stop, domain id.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        start, length = int(self._pieces.start[index]), int(self._pieces.length[index])
        span = slice(start, start + length)
        tokens = torch.from_numpy(self._documents.tokens[span].astype(np.int64))
        types = torch.from_numpy(self._documents.mask[span].astype(np.int64))
        target = torch.tensor(_NO_TARGET)
        if self.task is not None:
            label = int(self._documents.classes[self._numbers[index]])
            target = self.task.make_target(label)
        return tokens, torch.cat([target, torch.tensor([self.domain])]), types


def load_labelled_sequences(
    config: DataConfig, sources: Sequence[DataSource], tokenizer: Tokenizer, *, name: str
) -> list[LabelledSequences]:
    """Return the sequences of each source, tokenized or from the cache.

    Args:
        config: its ``train`` sources define the tasks.
        name: ``train`` or ``eval``, for messages.

    Raises:
        UserError: unreadable data, an unknown label, a record that is too long.
    """
    tasks, domains = list_class_tasks(config), list_domains(config)
    pairs = [
        apply_task_labels(source, tasks, f"data.{name}[{number}]")
        for number, source in enumerate(sources)
    ]
    labelled = [source for source, _ in pairs]
    loaded, sides = load_split_documents(config, labelled, tokenizer, name)
    variants = count_side_variants(config, labelled, name)
    found = []
    for number, ((source, task), documents, side) in enumerate(
        zip(pairs, loaded, sides, strict=True)
    ):
        key = f"data.{name}[{number}]"
        pieces = fit_documents(documents, config, key, side)
        refuse_empty_set(config, pieces, key)
        domain = -1 if source.domain is None else domains.index(source.domain)
        rows = LabelledSequences(
            documents,
            pieces,
            task,
            seq_len=config.seq_len,
            num_variants=variants[number],
            domain=domain,
        )
        shares = "no labels"
        if task is not None:
            counts = np.bincount(documents.classes[side], minlength=len(task.labels)).tolist()
            shares = ", ".join(f"{n} {c}" for n, c in zip(task.labels, counts, strict=True))
        shares += "" if source.domain is None else f"; domain {source.domain}"
        _LOG.info(
            "%s: %d sequences%s of up to %d tokens (%s)",
            key,
            len(rows),
            describe_epochs(rows.epoch_ranges),
            rows.longest,
            shares,
        )
        found.append(rows)
    return found


@dataclass(frozen=True)
class LabelledBatch(Batch):
    """One micro-batch on the CPU.

    Attributes:
        labels: long [B, 1], the class id, -100 for a filler sequence.
        attention_mask: long [B, S], 1 where there is a token.
        token_types: long [B, S].
        ranges: long [B, 2], class ids [first, stop) of each sequence's task.
        domains: long [B], id of each sequence's domain, -1 for one without; None: there are none.
    """

    attention_mask: torch.Tensor
    token_types: torch.Tensor
    ranges: torch.Tensor
    domains: torch.Tensor | None = None

    def measure_documents(self) -> torch.Tensor:
        """Return the tokens of the sequence at its positions, 0 at padding, long [B, S]."""
        return self.attention_mask * self.attention_mask.sum(1, keepdim=True)


class LabelledLoader(Loader[LabelledBatch]):
    """Loader of labelled sequences: batches have an attention mask and token types."""

    def _collate_rows(self, numbers: Sequence[int]) -> LabelledBatch:
        made = [self._load_row(number) for number in numbers]
        width = self._pad_width(max(len(tokens) for tokens, _, _ in made))
        input_ids = torch.full((len(made), width), self.pad_id)
        mask, types = (torch.zeros(len(made), width, dtype=torch.long) for _ in range(2))
        for b, (tokens, _, own_types) in enumerate(made):
            input_ids[b, : len(tokens)] = tokens
            mask[b, : max(1, len(tokens))] = 1
            types[b, : len(tokens)] = own_types
        targets = torch.stack([target for _, target, _ in made])
        return LabelledBatch(
            input_ids=input_ids,
            labels=targets[:, :1],
            position_ids=torch.arange(width).expand(len(made), -1),
            sample_ids=torch.tensor(numbers),
            attention_mask=mask,
            token_types=types,
            ranges=targets[:, 1:3],
            domains=targets[:, 3],
        )

    def _load_row(self, number: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if number >= 0:
            return self.rows.get_sequence(number)
        empty = torch.zeros(0, dtype=torch.long)
        return empty, torch.tensor([*_NO_TARGET, -1]), empty
