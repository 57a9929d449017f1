"""``y = x Q^T`` where the packed ``Q`` is ``quantize(W + s B A)``, trained straight through.

    forward    y  = x Q^T                  Q dequantized, used, freed; no product with A or B
    backward   dx = dy Q                   Q dequantized again
               dB = s dy^T (x A^T)         [out, r]
               dA = s (dy B)^T x           [r, in]

The straight-through estimator (Bengio et al. 2013) takes the gradient of rounding as one, so the
gradient of ``W + s B A`` is ``dy^T x``, ``[out, in]``. Of a product of factors it is only needed
times ``A`` and ``B``, and then the products above are the same sums in another order: no dense
gradient exists at any time.

The bytes are those that the caller keeps: whoever changes ``A`` or ``B`` encodes them again
(``adapters.lora.through_quantizer``). Factors and bytes are kept as objects, not by
``save_for_backward``: engines free them after forward and fill them again before backward (see
``quant.frozen_matmul``).

Products with the factors are computed in the arithmetic type, or in float32 on a CPU without
instructions for it (``quant.trainable_products``).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from dist_peft.quant.codec import Codec
from dist_peft.quant.cpu_products import has_fast_product
from dist_peft.quant.frozen_matmul import hold_weight, matmul_fp32_accumulate, take_weight
from dist_peft.quant.shared_decodes import get_block_decodes

__all__ = ["multiply_through"]


def multiply_through(
    x: Tensor,
    packed: Tensor,
    A: Tensor,
    B: Tensor,
    *,
    codec: Codec,
    scaling: float,
    dtype: torch.dtype,
) -> Tensor:
    """``x Q^T`` with ``Q`` the dequantized ``packed``; gradients of ``x``, ``A`` and ``B``.

    Args:
        x: ``[..., in]``, any float type; the weight is dequantized to this type.
        packed: ``uint8 [out, row_bytes]``, rows of ``W + s B A`` packed by ``codec``.
        A, B: ``[r, in]``, ``[out, r]``, float32.
        codec: of ``packed``.
        scaling: ``s``.
        dtype: arithmetic type of the products with the factors.

    Returns:
        ``[..., out]`` in the type of ``x``.

    Raises:
        ValueError: shapes or types do not fit.
        RuntimeError: the bytes of ``packed`` are not there (its engine has freed them).
    """
    if not x.is_floating_point() or x.dim() == 0 or x.shape[-1] != A.shape[1]:
        raise ValueError(f"x is floating point [..., {A.shape[1]}], not {x.dtype} {list(x.shape)}")
    result: Tensor = _ThroughProduct.apply(x, packed, A, B, codec, scaling, dtype)
    return result


class _ThroughProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        packed: Tensor,
        A: Tensor,
        B: Tensor,
        codec: Codec,
        scaling: float,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.packed, ctx.A, ctx.B = packed, A, B
        ctx.codec, ctx.scaling = codec, scaling
        ctx.work = dtype if has_fast_product(x.device, dtype) else torch.float32
        ctx.save_for_backward(x)
        ctx.decodes = get_block_decodes()
        weight = hold_weight(packed, codec, x.shape[-1], x.dtype, ctx.needs_input_grad[0])
        return matmul_fp32_accumulate(functional.linear, x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,), (dy,) = ctx.saved_tensors, grads
        need_x, _, need_A, need_B = ctx.needs_input_grad[:4]
        dx = dA = dB = None
        if need_x:
            weight = take_weight(ctx.decodes, ctx.packed, ctx.codec, x.shape[-1], dy.dtype)
            dx = matmul_fp32_accumulate(torch.matmul, dy, weight)
        if need_A or need_B:
            grad, inputs = (t.to(ctx.work).flatten(0, -2) for t in (dy, x))
            if need_B:
                inner = functional.linear(inputs, ctx.A.to(ctx.work)).mul_(ctx.scaling)
                # [r, out] first: with few rows a product of such a shape is faster on a CPU
                dB = (inner.T @ grad).T.to(ctx.B.dtype)
            if need_A:
                inner = (grad @ ctx.B.to(ctx.work)).mul_(ctx.scaling)
                dA = (inner.T @ inputs).to(ctx.A.dtype)
        return dx, None, dA, dB, None, None, None
