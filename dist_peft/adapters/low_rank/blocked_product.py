"""``W + s B A`` for a merge: float32 products whose result does not depend on the chunks.

A kernel's rounding can depend on the shape of the product. So the rows of the whole matrix are cut
into fixed blocks, and a block is always multiplied whole, also where only some of its rows are
wanted: a merge writes the same bytes whatever the size of its chunks.

Training and initialization, where rows are quantized after the product, use
``row_sharded.add_factor_product``, whose rows depend on no block.
"""

import torch
from torch import Tensor

from dist_peft.core.span import Span

__all__ = ["BLOCK_ROWS", "add_blocked_product", "add_expert_products"]

BLOCK_ROWS = 64
"""Chunks of a multiple of this many rows compute nothing twice."""


def add_blocked_product(rows: Tensor, B: Tensor, A: Tensor, span: Span) -> Tensor:
    """Return ``rows + B[span] A`` in float32.

    Args:
        rows: floating point ``[len(span), in]``, rows ``span`` of the matrix.
        B: ``[out, r]``, of the whole matrix.
        A: ``[r, in]``, scaled, on the device of ``rows``.
        span: which rows these are.

    Returns:
        float32 ``[len(span), in]``, new memory.
    """
    result = torch.empty(rows.shape, dtype=torch.float32, device=rows.device)
    begin = min(-(-span.start // BLOCK_ROWS) * BLOCK_ROWS, span.stop)
    end = max(begin, span.stop if span.stop == B.shape[0] else span.stop // BLOCK_ROWS * BLOCK_ROWS)
    left = B[begin:end].to(rows.device, torch.float32)
    inner = slice(begin - span.start, end - span.start)
    if end > begin:
        # a block is converted and multiplied while it is in the processor's cache
        for given, block, factor in zip(
            *(whole.split(BLOCK_ROWS) for whole in (rows[inner], result[inner], left)), strict=True
        ):
            block.copy_(given).addmm_(factor, A)
    for part in (Span(span.start, begin), Span(end, span.stop)):
        if len(part):
            own = part.shifted_by(-span.start).slice
            result[own] = _multiply_whole_block(rows[own], B, A, part)
    return result


def _multiply_whole_block(rows: Tensor, B: Tensor, A: Tensor, span: Span) -> Tensor:
    """``rows + B[span] A`` for a part ``span`` of one block, the rest of which is zeros."""
    start = span.start // BLOCK_ROWS * BLOCK_ROWS
    left = B[start : start + BLOCK_ROWS].to(rows.device, torch.float32)
    whole = torch.zeros(len(left), A.shape[1], dtype=torch.float32, device=rows.device)
    own = span.shifted_by(-start).slice
    whole[own] = rows.float()
    return whole.addmm_(left, A)[own]


def add_expert_products(
    rows: Tensor, B: Tensor, A: Tensor, scaling: float, experts: int, span: Span
) -> Tensor:
    """Return rows ``span`` of a stack of experts, which may begin and end within one, with each
    expert's own product added; blocks are counted from the first row of each expert.

    Args:
        rows: floating point ``[len(span), in]``.
        B: ``[experts * out, r]``.
        A: ``[experts * r, in]``.
        scaling: ``s``.
        experts: their number.
        span: which rows of the stack these are.

    Returns:
        float32 ``[len(span), in]``, new memory.
    """
    out, r = len(B) // experts, B.shape[1]
    parts = []
    for expert in range(span.start // out, -(-span.stop // out)):
        whole = Span(expert * out, (expert + 1) * out)
        own = whole.intersect(span)
        right = A[expert * r : (expert + 1) * r].to(rows.device) * scaling
        part = rows[own.shifted_by(-span.start).slice]
        inner = own.shifted_by(-whole.start)
        parts.append(add_blocked_product(part, B[whole.slice], right, inner))
    return torch.cat(parts) if parts else rows.float()
