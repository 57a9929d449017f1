"""Concatenation of several data sets, in which each sequence belongs to one of them.

Records of different sets never share a packed sequence, so every sequence has a task: training can
sample tasks (``data.order``), and evaluation reports their losses separately.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch

from dist_peft.data.cache import combine_sources
from dist_peft.data.classification import LabelledSequences
from dist_peft.data.documents import SequenceSet
from dist_peft.data.files import RecordPlace
from dist_peft.data.order import Ranges

__all__ = ["SequenceMixture"]


class SequenceMixture:
    """Concatenated data sets with consecutive indices.

    Attributes:
        task_names: names of the sets.
        starts: int64 [sets + 1]; sequences ``[starts[i], starts[i + 1])`` are those of set ``i``.
        fingerprint: sha256 of the sets' fingerprints.
    """

    def __init__(
        self, parts: Sequence[SequenceSet] | Sequence[LabelledSequences], names: Sequence[str]
    ) -> None:
        self.task_names = tuple(names)
        self._parts: tuple[SequenceSet | LabelledSequences, ...] = tuple(parts)
        self.starts = np.cumsum([0, *(len(part) for part in parts)], dtype=np.int64)
        text = "".join(part.fingerprint for part in parts)
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()

    @property
    def packed(self) -> bool:
        return self._parts[0].packed

    @property
    def seq_len(self) -> int:
        return self._parts[0].seq_len

    @property
    def longest(self) -> int:
        return max(part.longest for part in self._parts)

    @property
    def largest_token(self) -> int:
        return max(part.largest_token for part in self._parts)

    @property
    def chat_template(self) -> str | None:
        return next((p.chat_template for p in self._parts if p.chat_template), None)

    @property
    def has_conversations(self) -> bool | None:
        return combine_sources(part.has_conversations for part in self._parts)

    @property
    def sequence_counts(self) -> list[int]:
        """Number of sequences of each set."""
        return [len(part) for part in self._parts]

    @property
    def part_epochs(self) -> list[list[Ranges]]:
        """Of each set, the sequence indices of each epoch, in turn."""
        return [
            [[(start + first, start + stop) for first, stop in own] for own in part.epoch_ranges]
            for part, start in zip(self._parts, self.starts.tolist(), strict=False)
        ]

    @property
    def epoch_ranges(self) -> list[Ranges]:
        parts = self.part_epochs
        return [
            [each for own in parts for each in own[epoch % len(own)]]
            for epoch in range(max(map(len, parts)))
        ]

    def __len__(self) -> int:
        return int(self.starts[-1])

    def find_task_index(self, index: int) -> int:
        """Return the index of the set that sequence ``index`` belongs to."""
        return int(np.searchsorted(self.starts, index, side="right")) - 1

    def num_targets(self, index: int) -> int:
        part = self.find_task_index(index)
        return self._parts[part].num_targets(index - int(self.starts[part]))

    def get_sequence(self, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the three tensors of sequence ``index``, in the form of its set."""
        part = self.find_task_index(index)
        return self._parts[part].get_sequence(index - int(self.starts[part]))

    def list_records(self, index: int) -> list[tuple[int, RecordPlace]]:
        """Return the number of the set and the place of each record in sequence ``index``."""
        part = self.find_task_index(index)
        found = self._parts[part].list_records(index - int(self.starts[part]))
        return [(part, place) for _, place in found]
