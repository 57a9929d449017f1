"""A made-up row set for loops: one document a row, with a given number of targets each."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from dist_peft.data.loader import Batch, Loader, SingleTask, TokenLoader


class UnevenRows(SingleTask):
    """Row ``i`` has ``counts[i]`` targets, at its end, after two tokens of prompt."""

    packed = False

    def __init__(self, counts: Sequence[int]) -> None:
        self.counts = counts
        self.seq_len = max(counts) + 2

    def __len__(self) -> int:
        return len(self.counts)

    def num_targets(self, index: int) -> int:
        return self.counts[index]

    def get_sequence(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        length = self.counts[index] + 2
        tokens = torch.randint(3, 97, (length + 1,), generator=torch.Generator().manual_seed(index))
        labels = tokens[1:].clone()
        labels[:2] = -100
        return tokens[:-1], labels, torch.arange(length)


def make_loader(
    rows: UnevenRows, batch: int, micro: int, rank: int = 0, world_size: int = 1
) -> Loader[Batch]:
    return TokenLoader(
        cast(Any, rows),
        global_batch=batch,
        micro_batch=micro,
        seed=0,
        shuffle=False,
        data_rank=rank,
        data_size=world_size,
        seq_len=16,
        pad_id=0,
    )
