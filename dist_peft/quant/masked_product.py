"""A low-rank change of those weights alone that are not zero in the base.

Pruning leaves zeros in a frozen weight ``W`` [out, in]. LoRA's change is dense and fills them; here
it is cut off where the base is zero, so that base and change together have the base's zeros::

    M  = (W != 0)                                   decoded again in each pass, never stored
    y  = x (M * s B A)^T                            A [r, in], B [out, r]

    G  = M * s (dy^T x)                             [out, in]
    dA = B^T G      dB = G A^T      dx = dy (M * s B A)

The gradient of a masked change is the masked gradient: this is the sparse training of Frankle and
Carbin (2019) with a mask that is given, applied to the product and not to the factors, which have
no zeros of their own.

``W + M * s B A`` is not formed. In 16 bits the sum would round most small changes away (those below
``2^-9 |W|``), and dropout is on the input of the change alone. So ``x W^T`` stays the frozen
matmul, and the change is a second dense product: with ``T`` tokens a forward has ``T out in``
multiplications more and a backward twice that, beyond ``4 r out in`` for the products of the
factors. LoRA needs ``r T (out + in)``. Memory: one ``[out, in]`` matrix in the arithmetic type at a
time, and a chunk of the decoded weight.

The mask is that of the weight decoded to float32, whatever the arithmetic type, since a merge
decodes to that as well.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from dist_peft.core.span import Span
from dist_peft.quant.codec import Codec
from dist_peft.quant.cpu_products import has_fast_product
from dist_peft.quant.frozen_matmul import check_packed_storage

__all__ = ["apply_masked_low_rank"]

_CHUNK_ELEMENTS = 2**22
"""Elements of the weight that are decoded at a time: 16 MiB."""


def apply_masked_low_rank(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    packed: Tensor,
    codec: Codec,
    scaling: float,
    dtype: torch.dtype,
) -> Tensor:
    """``x (M * s B A)^T``, differentiable in ``x``, ``A`` and ``B``; see the module.

    Args:
        x: ``[..., in]``, any float type.
        A, B: ``[r, in]``, ``[out, r]``, float32.
        packed: ``uint8 [out, row_bytes]``, the frozen weight. It and the factors are kept as
            objects, which engines fill again before backward.
        codec: of ``packed``.
        scaling: ``s``.
        dtype: arithmetic type.

    Returns:
        ``[..., out]`` in ``dtype``.

    Raises:
        RuntimeError: the bytes of ``packed`` are not there (its engine has freed them).
    """
    change: Tensor = _MaskedProduct.apply(x, A, B, packed, codec, scaling, dtype)
    return change


class _MaskedProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        packed: Tensor,
        codec: Codec,
        scaling: float,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.A, ctx.B, ctx.packed, ctx.codec, ctx.scaling = A, B, packed, codec, scaling
        ctx.work = dtype if has_fast_product(x.device, dtype) else torch.float32
        ctx.save_for_backward(x)
        change = _compute_masked_change(A, B, packed, codec, scaling, ctx.work)
        return functional.linear(x.to(ctx.work), change).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        A, B, work = ctx.A, ctx.B, ctx.work
        need_x, need_A, need_B = ctx.needs_input_grad[:3]
        grad = grads[0].to(work).flatten(0, -2)
        dx = dA = dB = None
        if need_A or need_B:
            weight_grad = grad.T @ x.flatten(0, -2).to(work)
            _zero_where_base_is_zero(weight_grad.mul_(ctx.scaling), ctx.packed, ctx.codec)
            if need_A:
                dA = (B.to(work).T @ weight_grad).to(A.dtype)
            if need_B:
                dB = (weight_grad @ A.to(work).T).to(B.dtype)
            del weight_grad
        if need_x:
            change = _compute_masked_change(A, B, ctx.packed, ctx.codec, ctx.scaling, work)
            dx = (grad @ change).view(x.shape).to(x.dtype)
        return dx, dA, dB, None, None, None, None


def _compute_masked_change(
    A: Tensor, B: Tensor, packed: Tensor, codec: Codec, scaling: float, work: torch.dtype
) -> Tensor:
    """``M * s B A`` [out, in] in the type ``work``."""
    change = (B.to(work) @ A.to(work)).mul_(scaling)
    return _zero_where_base_is_zero(change, packed, codec)


def _zero_where_base_is_zero(dense: Tensor, packed: Tensor, codec: Codec) -> Tensor:
    """Set elements of ``dense`` [out, in] to zero, in place, where the packed weight is zero."""
    check_packed_storage(packed)
    rows, columns = dense.shape
    for part in Span(0, rows).split_into_chunks(max(1, _CHUNK_ELEMENTS // max(1, columns))):
        weight = codec.dequantize_rows(packed.detach()[part.slice], columns, torch.float32)
        dense[part.slice].masked_fill_(weight == 0, 0)
    return dense
