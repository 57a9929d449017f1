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

__all__ = ["BLOCK_ROWS", "add_blocked_product"]

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
    for start in range(span.start - span.start % BLOCK_ROWS, span.stop, BLOCK_ROWS):
        block = Span(start, min(start + BLOCK_ROWS, B.shape[0]))
        own = block.intersect(span)
        left = B[block.slice].to(rows.device, torch.float32)
        part = result[own.shifted_by(-span.start).slice]
        if own == block:
            part.copy_(rows[own.shifted_by(-span.start).slice])
            part.addmm_(left, A)
        else:
            whole = torch.zeros(len(block), A.shape[1], dtype=torch.float32, device=rows.device)
            inner = own.shifted_by(-start).slice
            whole[inner] = rows[own.shifted_by(-span.start).slice].float()
            part.copy_(whole.addmm_(left, A)[inner])
    return result
