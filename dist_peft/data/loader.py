"""Select the sequences of an optimizer step, and collate this rank's micro-batches of them.

The order of sequences is a function of seed, epoch and their number only. Step ``s`` takes the
positions ``[s*G, (s+1)*G)`` of the infinite order "permutation of epoch 0, of epoch 1, ..." (G:
sequences per global batch). They are split into the fewest micro-batches of at most ``M``
sequences, as even as possible; then whole micro-batches are dealt to the ``W`` data-parallel
ranks in turn::

    positions   0 1 2 3 4 5 6 | 7 8 9 ...        G = 7, M = 2
    split       [0 1] [2 3] [4 5] [6]
    W = 2       rank 0: [0 1] [4 5]      rank 1: [2 3] [6]
    W = 3       rank 0: [0 1] [6]        rank 1: [2 3] [-]       rank 2: [4 5] [-]

``-`` is a filler sequence, which has no labels: all ranks run equally many micro-batches, since
forward and backward contain collectives. So a step holds the same micro-batches at any number of
ranks (padding and rounding of a sequence depend on its neighbours), any step can be built directly
(resuming needs one integer), and each rank knows the step's number of target tokens without
communication.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Generic, Protocol, TypeVar

import torch

from dist_peft.core.progress_beat import start_step_phase
from dist_peft.data.files import RecordPlace
from dist_peft.data.order import PoolOrder, Ranges, SequenceOrder
from dist_peft.data.packing import IGNORE

__all__ = [
    "Batch",
    "Loader",
    "SequenceDataset",
    "SingleTask",
    "TokenLoader",
    "count_micro_batches",
    "find_batch_tasks",
]

_FILLER = -1
_WIDTH_MULTIPLE = 8  # of unpacked batches, for the tensor cores


@dataclass(frozen=True)
class Batch:
    """One micro-batch on the CPU.

    Attributes:
        input_ids: long [B, S], padded with the pad token.
        labels: long [B, S]; ``labels[b, t]`` is the token to predict at ``t``, already shifted, or
            -100 (other documents, prompts, padding).
        position_ids: long [B, S]; restart at 0 with each document and with the padding.
        sample_ids: long [B]; index of the sequence in the data set, -1 for a filler sequence.
        is_packed: false: a sequence is one document and its padding.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    sample_ids: torch.Tensor
    is_packed: bool = field(default=True, kw_only=True)

    def measure_documents(self) -> torch.Tensor:
        """Return the tokens of the document that each position belongs to, long [B, S].

        Padding is a document of its own.
        """
        starts = self.position_ids == 0
        starts[:, 0] = True
        number = starts.cumsum(1) - 1
        counts = torch.zeros_like(number).scatter_add_(1, number, torch.ones_like(number))
        return counts.gather(1, number)


class SequenceDataset(Protocol):
    """A data set of indexed sequences that a loader reads; ``documents.SequenceSet`` is the main
    one."""

    @property
    def packed(self) -> bool: ...

    @property
    def seq_len(self) -> int: ...

    @property
    def longest(self) -> int: ...

    @property
    def largest_token(self) -> int: ...

    @property
    def task_names(self) -> tuple[str, ...]:
        """Names of the tasks that the sequences belong to; ``("",)``: a single unnamed task."""
        ...

    @property
    def sequence_counts(self) -> list[int]:
        """Number of sequences of each task."""
        ...

    @property
    def epoch_ranges(self) -> list[Ranges]:
        """Sequence indices [first, stop) of each epoch, in turn: an epoch has one variant of each
        record (``data.augmenting``); one entry without variants."""
        ...

    def find_task_index(self, index: int) -> int:
        """Return the index in ``task_names`` of the task of sequence ``index``."""
        ...

    def __len__(self) -> int: ...

    def num_targets(self, index: int) -> int: ...

    def get_sequence(self, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]: ...

    def list_records(self, index: int) -> list[tuple[int, RecordPlace]]:
        """Return, for each record in sequence ``index``, the number of its source in the
        configuration and its place; empty where sequences are not read from files."""
        ...


class SingleTask(ABC):
    """Base of data sets whose sequences belong to one unnamed task."""

    task_names: tuple[str, ...] = ("",)

    @abstractmethod
    def __len__(self) -> int: ...

    @property
    def sequence_counts(self) -> list[int]:
        return [len(self)]

    @property
    def epoch_ranges(self) -> list[Ranges]:
        return [[(0, len(self))]]

    def find_task_index(self, index: int) -> int:
        return 0

    def list_records(self, index: int) -> list[tuple[int, RecordPlace]]:
        return []


BatchT = TypeVar("BatchT", bound=Batch)


class Loader(ABC, Generic[BatchT]):
    """Load the batches of one rank; a subclass collates sequences into its kind of batch.

    Args:
        rows: the data set, the same on every rank.
        global_batch: sequences per optimizer step, over all ranks.
        micro_batch: most sequences per forward pass of a rank.
        seed, shuffle: order of the sequences; without shuffling, that of the data set.
        data_rank, data_size: select the share to load.
        seq_len: padded length of packed sequences; at least that of the data set.
        pad_id: padding token; any valid one, it is never attended to or predicted.
        order: sequences of each step; default: all in one pool.

    Attributes:
        rows, pad_id: as given.
    """

    def __init__(
        self,
        rows: SequenceDataset,
        *,
        global_batch: int,
        micro_batch: int,
        seed: int,
        shuffle: bool,
        data_rank: int,
        data_size: int,
        seq_len: int,
        pad_id: int,
        order: SequenceOrder | None = None,
    ) -> None:
        if min(global_batch, micro_batch) < 1 or not 0 <= data_rank < data_size:
            raise ValueError(f"batch {global_batch}/{micro_batch}, rank {data_rank} of {data_size}")
        if seq_len < rows.seq_len:
            raise ValueError(f"seq_len {seq_len} is below that of the data set, {rows.seq_len}")
        self.rows = rows
        self._global_batch = global_batch
        self._micro_batch = micro_batch
        self._data_rank = data_rank
        self._data_size = data_size
        self._seq_len = seq_len
        self.pad_id = pad_id
        self._order = order or PoolOrder(len(rows), seed, shuffle, rows.epoch_ranges)

    def check_steps(self, steps: int) -> None:
        """Check that each of the first ``steps`` steps has sequences.

        Raises:
            UserError: one has none.
        """
        self._order.check_steps(steps)

    @property
    def rows_per_epoch(self) -> float:
        """Sequences of an epoch, on average: with variants of records, packed ones differ."""
        epochs = self.rows.epoch_ranges
        return sum(stop - first for own in epochs for first, stop in own) / len(epochs)

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps to load every sequence once; the last may start the next epoch."""
        return math.ceil(self.rows_per_epoch / self._global_batch)

    def load_step(self, index: int) -> tuple[list[BatchT], int]:
        """Return this rank's micro-batches of optimizer step ``index`` (from 0) and its targets.

        Every rank gets the same number of micro-batches.

        Returns:
            The micro-batches, and the number of target tokens of the whole step, over all ranks
            and micro-batches.

        Raises:
            IndexError: a negative step.
        """
        if index < 0:
            raise IndexError(f"step {index}")
        start_step_phase(index + 1, "read data")
        chosen = self.list_step_rows(index)
        return self._make_batches(chosen), sum(self.rows.num_targets(row) for row in chosen)

    def count_share_targets(self, index: int) -> list[int]:
        """Return the target tokens of optimizer step ``index`` of each data-parallel rank."""
        parts = _split_into_micro_batches(self.list_step_rows(index), self._micro_batch)
        return [
            sum(self.rows.num_targets(row) for part in parts[r :: self._data_size] for row in part)
            for r in range(self._data_size)
        ]

    def load_all_sequential(self) -> list[BatchT]:
        """Return this rank's micro-batches of all sequences, once and in order, for evaluation.

        Every rank gets the same number of batches.
        """
        return self._make_batches(range(len(self.rows)))

    def load_first_sequences(self, count: int) -> list[BatchT]:
        """Return this rank's micro-batches of the first ``count`` sequences of the run's order.

        Every rank gets the same number of batches.
        """
        return self._make_batches(self._order.list_rows(0, count))

    def list_step_rows(self, index: int) -> list[int]:
        """Return the indices of the sequences, over all ranks, of optimizer step ``index``."""
        first = index * self._global_batch
        return self._order.list_rows(first, self._global_batch)

    def _make_batches(self, chosen: Sequence[int]) -> list[BatchT]:
        parts = _split_into_micro_batches(chosen, self._micro_batch)
        share = parts[self._data_rank :: self._data_size]
        most = -(-len(parts) // self._data_size)
        share += [[_FILLER]] * (most - len(share))
        return [self._collate_rows(numbers) for numbers in share]

    @abstractmethod
    def _collate_rows(self, numbers: Sequence[int]) -> BatchT:
        """Collate the sequences ``numbers``, at least one, into a padded batch; -1 is a filler."""

    def _pad_width(self, longest: int) -> int:
        """Return the padded length: ``seq_len`` if packed, else ``longest`` rounded up."""
        if self.rows.packed:
            return self._seq_len
        rounded = -(-max(longest, 1) // _WIDTH_MULTIPLE) * _WIDTH_MULTIPLE
        return min(rounded, self._seq_len)


class TokenLoader(Loader[Batch]):
    """Loader of token sequences, whose targets are their next tokens."""

    def _collate_rows(self, numbers: Sequence[int]) -> Batch:
        empty = torch.zeros(0, dtype=torch.long)
        made = [(empty,) * 3 if n == _FILLER else self.rows.get_sequence(n) for n in numbers]
        width = self._pad_width(max(len(tokens) for tokens, _, _ in made))
        input_ids = torch.full((len(made), width), self.pad_id)
        labels = torch.full((len(made), width), IGNORE)
        position_ids = torch.zeros((len(made), width), dtype=torch.long)
        for b, (tokens, targets, positions) in enumerate(made):
            length = len(tokens)
            input_ids[b, :length] = tokens
            labels[b, :length] = targets
            position_ids[b, :length] = positions
            position_ids[b, length:] = torch.arange(width - length)
        sample_ids = torch.tensor(numbers)
        return Batch(input_ids, labels, position_ids, sample_ids, is_packed=self.rows.packed)


def count_micro_batches(sequences: int, micro_batch: int) -> int:
    """Return the fewest micro-batches of at most ``micro_batch`` that hold all ``sequences``."""
    return -(-sequences // micro_batch)


def _split_into_micro_batches(rows: Sequence[int], micro_batch: int) -> list[list[int]]:
    """Split ``rows``, in order, into ``count_micro_batches`` parts.

    Sizes differ by at most one, larger ones first, so that ranks that compute at the same time
    have about equal work.
    """
    count = count_micro_batches(len(rows), micro_batch)
    bounds = [-(-len(rows) * part // count) for part in range(count + 1)]
    return [list(rows[start:stop]) for start, stop in pairwise(bounds)]


def find_batch_tasks(rows: SequenceDataset, batch: Batch) -> list[int]:
    """Return the index of the task of each sequence of ``batch``; 0 for a filler sequence."""
    return [rows.find_task_index(max(sample, 0)) for sample in batch.sample_ids.tolist()]
