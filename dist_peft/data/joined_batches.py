"""Micro-batches of several runs as one batch."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from dist_peft.data.loader import Batch
from dist_peft.data.packing import IGNORE

__all__ = ["join_batches"]


def join_batches(batches: Sequence[Batch]) -> Batch:
    """Return the sequences of all ``batches``, in their order, padded to the widest.

    Args:
        batches: at least one; all packed, and then of one width, or none.
    """
    width = max(batch.input_ids.shape[1] for batch in batches)
    wide = [_widen_batch(batch, width) for batch in batches]
    return Batch(
        torch.cat([batch.input_ids for batch in wide]),
        torch.cat([batch.labels for batch in wide]),
        torch.cat([batch.position_ids for batch in wide]),
        torch.cat([batch.sample_ids for batch in wide]),
        is_packed=batches[0].is_packed,
    )


def _widen_batch(batch: Batch, width: int) -> Batch:
    more = width - batch.input_ids.shape[1]
    if not more:
        return batch
    return Batch(
        functional.pad(batch.input_ids, (0, more)),
        functional.pad(batch.labels, (0, more), value=IGNORE),
        _continue_padding(batch.position_ids, more),
        batch.sample_ids,
        is_packed=batch.is_packed,
    )


def _continue_padding(positions: Tensor, more: int) -> Tensor:
    """Append ``more`` positions to sequences of one document and its padding, so that they still
    are that: positions continue where there is padding, and begin at 0 where there is none."""
    has_padding = (positions[:, 1:] == 0).any(1, keepdim=True)
    begin = torch.where(has_padding, positions[:, -1:] + 1, 0)
    return torch.cat([positions, begin + torch.arange(more)], 1)
