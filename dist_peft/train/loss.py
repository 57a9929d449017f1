"""Cross entropy of next tokens, without a float32 copy of the logits.

For one position with logits ``z`` (a row of ``V`` values) and target ``t``::

    m       = max(z),  n = log sum exp(z - m)
    loss    = n - (z[t] - m)
    d loss  = softmax(z) - onehot(t) = exp(z - m - n) - onehot(t)

The usual way casts ``[B, S, V]`` logits to float32 first and keeps that copy, its log-softmax and
its gradient: with 4096 positions and a vocabulary of 128 000, three times 2 GiB on top of 1 GiB of
bfloat16 logits. Here rows are taken in chunks of ``CHUNK_ELEMENTS`` values; between forward and
backward only the logits themselves and two numbers a row are kept, and backward computes the
softmax again, chunk by chunk, straight into a gradient of the logits' type::

    kept       logits [B, S, V], (m, n) [2, N]     for the N positions with a target
    backward   gradient [B, S, V] in the logits' dtype, one float32 chunk [rows, V] at a time

``m`` and ``n`` are kept apart: in their sum, ``logsumexp(z)``, a large ``m`` rounds ``n`` away.

Positions without a target (label -100: prompts, padding) are skipped, not multiplied by zero; their
gradient is zero. Arithmetic is float32 (float64 for float64 logits), as in
``F.cross_entropy(logits.float(), labels, reduction="sum")``.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["IGNORE", "sum_token_loss"]

IGNORE = -100
"""The label of a position that does not contribute to the loss."""

CHUNK_ELEMENTS = 2**24
"""Logits in float32 at a time: 64 MiB."""


def sum_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the sum of the cross entropy of all target tokens, in nats.

    Args:
        logits: ``[B, S, V]`` of any float dtype.
        labels: int64 ``[B, S]``: the token predicted *at* each position (already shifted), or -100.

    Returns:
        A float32 scalar; 0 with a zero gradient when no label counts.
    """
    if labels.shape != logits.shape[:-1]:
        raise ValueError(f"labels {tuple(labels.shape)} do not fit logits {tuple(logits.shape)}")
    loss: Tensor = _TokenLoss.apply(logits, labels)
    return loss


class _TokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        places = (labels != IGNORE).nonzero()
        targets = labels[places[:, 0], places[:, 1]].unsqueeze(1)
        arithmetic = torch.promote_types(logits.dtype, torch.float32)
        normalizers = torch.empty(2, len(places), dtype=arithmetic, device=logits.device)
        total = torch.zeros((), dtype=arithmetic, device=logits.device)
        for part in _split_into_chunks(len(places), logits.shape[-1]):
            rows = _copy_logit_rows(logits, places[part], arithmetic)
            peaks = rows.amax(1)
            chosen = rows.sub_(peaks[:, None]).gather(1, targets[part]).squeeze(1)
            norms = rows.exp_().sum(1).log_()
            total += (norms - chosen).sum()
            normalizers[0, part], normalizers[1, part] = peaks, norms
        ctx.save_for_backward(logits, places, targets, normalizers)
        return total.float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        logits, places, targets, normalizers = ctx.saved_tensors
        scale = upstream.to(normalizers.dtype)
        minus_one = -torch.ones_like(targets, dtype=normalizers.dtype)
        gradient = torch.zeros_like(logits)
        for part in _split_into_chunks(len(places), logits.shape[-1]):
            rows = _copy_logit_rows(logits, places[part], normalizers.dtype)
            peaks, norms = normalizers[:, part, None]
            rows.sub_(peaks).sub_(norms).exp_()
            rows.scatter_add_(1, targets[part], minus_one[part]).mul_(scale)
            index = places[part]
            gradient[index[:, 0], index[:, 1]] = rows.to(logits.dtype)
        return gradient, None


def _copy_logit_rows(logits: Tensor, places: Tensor, dtype: torch.dtype) -> Tensor:
    """Copy the logits at ``places`` [n, 2] to a new ``[n, V]``; any strides, no flattening."""
    return logits[places[:, 0], places[:, 1]].to(dtype)


def _split_into_chunks(rows: int, vocabulary: int) -> Iterator[slice]:
    size = max(1, CHUNK_ELEMENTS // vocabulary)
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))
