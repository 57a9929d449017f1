"""Select the sequences of an optimizer step, and collate this rank's share of them into batches.

The order of sequences is a function of seed, epoch and their number only. Step ``s`` takes the
positions ``[s*G, (s+1)*G)`` of the infinite order "permutation of epoch 0, of epoch 1, ..." (G:
sequences per global batch), and rank ``r`` of ``W`` takes every ``W``-th of them::

    positions   0 1 2 3 4 5 | 6 7 8 ...          G = 6
    W = 2       rank 0: 0 2 4   rank 1: 1 3 5
    W = 4       rank 0: 0 4   1: 1 5   2: 2 -   3: 3 -      -: a filler sequence, no labels

So a step holds the same sequences at any world size, any step can be built directly (resuming needs
one integer), and each rank knows the step's number of target tokens without communication.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from dist_peft.data.order import PoolOrder, SequenceOrder
from dist_peft.data.packing import IGNORE

__all__ = ["Batch", "Loader", "SequenceDataset"]

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
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    sample_ids: torch.Tensor


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

    def __len__(self) -> int: ...

    def num_targets(self, index: int) -> int: ...

    def get_sequence(self, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]: ...


class Loader:
    """Load the batches of one rank.

    Args:
        rows: the data set, the same on every rank.
        global_batch: sequences per optimizer step, over all ranks.
        micro_batch: sequences per forward pass of a rank.
        seed, shuffle: order of the sequences; without shuffling, that of the data set.
        rank, world_size: select the share to load.
        seq_len: padded length of packed sequences; at least that of the data set.
        pad_id: padding token; any valid one, it is never attended to or predicted.
        order: sequences of each step; default: all in one pool.
    """

    def __init__(
        self,
        rows: SequenceDataset,
        *,
        global_batch: int,
        micro_batch: int,
        seed: int,
        shuffle: bool,
        rank: int,
        world_size: int,
        seq_len: int,
        pad_id: int,
        order: SequenceOrder | None = None,
    ) -> None:
        if min(global_batch, micro_batch) < 1 or not 0 <= rank < world_size:
            raise ValueError(f"batch {global_batch}/{micro_batch}, rank {rank} of {world_size}")
        if seq_len < rows.seq_len:
            raise ValueError(f"seq_len {seq_len} is below that of the data set, {rows.seq_len}")
        self.rows = rows
        self._global_batch = global_batch
        self._micro_batch = micro_batch
        self._rank = rank
        self._world_size = world_size
        self._seq_len = seq_len
        self._pad_id = pad_id
        self._order = order or PoolOrder(len(rows), seed, shuffle)

    def check_steps(self, steps: int) -> None:
        """Check that each of the first ``steps`` steps has sequences.

        Raises:
            UserError: one has none.
        """
        self._order.check_steps(steps)

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps to load every sequence once; the last may start the next epoch."""
        return -(-len(self.rows) // self._global_batch)

    def load_step(self, index: int) -> tuple[list[Batch], int]:
        """Return this rank's micro-batches of optimizer step ``index`` (from 0) and its targets.

        Every rank gets the same number of micro-batches, each of the same number of sequences.

        Returns:
            The micro-batches, and the number of target tokens of the whole step, over all ranks
            and micro-batches.

        Raises:
            IndexError: a negative step.
        """
        if index < 0:
            raise IndexError(f"step {index}")
        chosen = self.list_step_rows(index)
        return self._make_batches(chosen), sum(self.rows.num_targets(row) for row in chosen)

    def load_all_sequential(self) -> list[Batch]:
        """Return this rank's share of all sequences, once and in order, for evaluation.

        Every rank gets the same number of batches.
        """
        return self._make_batches(range(len(self.rows)))

    def list_step_rows(self, index: int) -> list[int]:
        """Return the indices of the sequences, over all ranks, of optimizer step ``index``."""
        first = index * self._global_batch
        return self._order.list_rows(first, self._global_batch)

    def _make_batches(self, chosen: Sequence[int]) -> list[Batch]:
        share = list(chosen[self._rank :: self._world_size])
        most = -(-len(chosen) // self._world_size)
        share += [_FILLER] * (most - len(share))
        return [
            self._collate_rows(share[start : start + self._micro_batch])
            for start in range(0, most, self._micro_batch)
        ]

    def _collate_rows(self, numbers: list[int]) -> Batch:
        empty = torch.zeros(0, dtype=torch.long)
        made = [(empty,) * 3 if n == _FILLER else self.rows.get_sequence(n) for n in numbers]
        width = self._pad_width(max(len(tokens) for tokens, _, _ in made))
        input_ids = torch.full((len(made), width), self._pad_id)
        labels = torch.full((len(made), width), IGNORE)
        position_ids = torch.zeros((len(made), width), dtype=torch.long)
        for b, (tokens, targets, positions) in enumerate(made):
            length = len(tokens)
            input_ids[b, :length] = tokens
            labels[b, :length] = targets
            position_ids[b, :length] = positions
            position_ids[b, length:] = torch.arange(width - length)
        return Batch(input_ids, labels, position_ids, torch.tensor(numbers))

    def _pad_width(self, longest: int) -> int:
        """Return the padded length: ``seq_len`` if packed, else ``longest`` rounded up."""
        if self.rows.packed:
            return self._seq_len
        rounded = -(-max(longest, 1) // _WIDTH_MULTIPLE) * _WIDTH_MULTIPLE
        return min(rounded, self._seq_len)
