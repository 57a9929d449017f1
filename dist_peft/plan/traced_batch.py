"""The micro-batch of a traced step: of the largest shape that a run can have."""

from typing import Any

import torch
from torch import Tensor, nn

from dist_peft.core.config.run import RunConfig
from dist_peft.data.classification import LabelledBatch
from dist_peft.data.loader import Batch
from dist_peft.model.document_attention import DOCUMENT_ATTENTION
from dist_peft.train.objective import ClassificationObjective, Objective, TokenObjective

__all__ = ["build_traced_batch"]


def build_traced_batch(
    model: nn.Module, config: RunConfig, sample_ids: Tensor, device_type: str
) -> tuple[Objective[Any], Batch]:
    """Return the objective of ``config`` and a micro-batch of ``len(sample_ids)`` sequences.

    All have ``data.seq_len`` tokens. Their numbers are zero: nothing but shapes is traced.

    Args:
        device_type: ``cuda`` or ``cpu``: which of the kernels' ways is taken.
    """
    if config.base.head == "classifier":
        return ClassificationObjective(), _build_labelled_batch(model, config, sample_ids)
    return TokenObjective(), _build_token_batch(model, config, sample_ids, device_type)


def _build_token_batch(
    model: nn.Module, config: RunConfig, sample_ids: Tensor, device_type: str
) -> Batch:
    """Return a batch of whole sequences, of which every token but the last is a target.

    Sequences hold two documents, which a mask separates; or one, where a GPU's attention takes any
    number of documents at once: on the CPU, where this runs, it takes one after the other.
    """
    sequences, length = len(sample_ids), config.data.seq_len
    whole: Any = model.config
    at_once = device_type != "cpu" and whole._attn_implementation == DOCUMENT_ATTENTION
    half = length if at_once else length // 2
    places = torch.cat([torch.arange(half), torch.arange(length - half)])
    ids = torch.zeros(sequences, length, dtype=torch.long)
    labels = ids.clone()
    labels[:, -1] = -100
    places = places.expand(sequences, -1).contiguous()
    return Batch(ids, labels, places, sample_ids, is_packed=config.data.packing)


def _build_labelled_batch(model: nn.Module, config: RunConfig, sample_ids: Tensor) -> LabelledBatch:
    """Return a batch of classes. One sequence is whole, the others have a token of padding, so
    that attention needs its mask as in most batches of a run."""
    sequences, length = len(sample_ids), config.data.seq_len
    ids = torch.zeros(sequences, length, dtype=torch.long)
    mask = torch.ones_like(ids)
    mask[1:, -1] = 0
    whole: Any = model.config
    ranges = torch.tensor([0, whole.num_labels]).expand(sequences, -1)
    return LabelledBatch(
        input_ids=ids,
        labels=torch.zeros(sequences, 1, dtype=torch.long),
        position_ids=torch.arange(length).expand(sequences, -1),
        sample_ids=sample_ids,
        attention_mask=mask,
        token_types=torch.zeros_like(ids),
        ranges=ranges,
    )
