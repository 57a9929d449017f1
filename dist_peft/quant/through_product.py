"""``y = x Q^T`` where the packed ``Q`` is ``quantize(W + s B A)``, trained straight through.

    forward    y  = x Q^T                  Q dequantized, used, freed; no product with A or B
    backward   dx = dy Q                   Q dequantized again
               dB = s dy^T (x A^T)         [out, r]
               dA = s (dy B)^T x           [r, in]

The straight-through estimator (Bengio et al. 2013) takes the gradient of rounding as one, so the
gradient of ``W + s B A`` is ``dy^T x``, ``[out, in]``. Of a product of factors it is only needed
times ``A`` and ``B``, and then the products above are the same sums in another order: no dense
gradient exists at any time.

A pair ``Az`` ``[r, L]``, ``Bz`` ``[out, r]`` may move the zeros of the ``L`` groups of a row
(``adapters.low_rank.zero_points``). It changes all weights of a group alike, and so meets sums of
inputs, as in QA-LoRA; ``P`` sums each group::

               dBz = s dy^T (P x Az^T)        [out, r]
               dAz = s (dy Bz)^T P x          [r, L]

The bytes are those that the caller keeps: whoever changes ``A`` or ``B`` encodes them again
(``adapters.lora.through_quantizer``). Factors and bytes are kept as objects, not by
``save_for_backward``: engines free them after forward and fill them again before backward (see
``quant.frozen_matmul``).

Products with the factors are computed in the arithmetic type, or in float32 on a CPU without
instructions for it (``quant.trainable_products``).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from dist_peft.quant.codec import Codec
from dist_peft.quant.cpu_products import has_fast_product
from dist_peft.quant.frozen_matmul import hold_weight, matmul_fp32_accumulate, take_weight
from dist_peft.quant.shared_decodes import get_block_decodes

__all__ = ["ZeroFactors", "multiply_through"]


class ZeroFactors(NamedTuple):
    """Factors of the change of groups' zeros.

    Attributes:
        A, B: ``[r, L]``, ``[out, r]``, float32.
        group_size: columns of a group; the last one of a row may have fewer.
    """

    A: Tensor
    B: Tensor
    group_size: int


def multiply_through(
    x: Tensor,
    packed: Tensor,
    A: Tensor,
    B: Tensor,
    *,
    codec: Codec,
    scaling: float,
    dtype: torch.dtype,
    zeros: ZeroFactors | None = None,
) -> Tensor:
    """``x Q^T`` with ``Q`` the dequantized ``packed``; gradients of ``x``, ``A``, ``B``
    and the factors of ``zeros``.

    Args:
        x: ``[..., in]``, any float type; the weight is dequantized to this type.
        packed: ``uint8 [out, row_bytes]``, rows of ``W + s B A`` packed by ``codec``.
        A, B: ``[r, in]``, ``[out, r]``, float32.
        codec: of ``packed``.
        scaling: ``s``.
        dtype: arithmetic type of the products with the factors.
        zeros: the pair that moves zeros, which ``packed`` holds already.

    Returns:
        ``[..., out]`` in the type of ``x``.

    Raises:
        ValueError: shapes or types do not fit.
        RuntimeError: the bytes of ``packed`` are not there (its engine has freed them).
    """
    if not x.is_floating_point() or x.dim() == 0 or x.shape[-1] != A.shape[1]:
        raise ValueError(f"x is floating point [..., {A.shape[1]}], not {x.dtype} {list(x.shape)}")
    size, pair = (0, (None, None)) if zeros is None else (zeros.group_size, zeros[:2])
    result: Tensor = _ThroughProduct.apply(x, packed, A, B, *pair, size, codec, scaling, dtype)
    return result


class _ThroughProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        packed: Tensor,
        A: Tensor,
        B: Tensor,
        zero_A: Tensor | None,
        zero_B: Tensor | None,
        group_size: int,
        codec: Codec,
        scaling: float,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.packed, ctx.A, ctx.B = packed, A, B
        ctx.zero_A, ctx.zero_B, ctx.group_size = zero_A, zero_B, group_size
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
        dx = dA = dB = dzA = dzB = None
        if ctx.needs_input_grad[0]:
            weight = take_weight(ctx.decodes, ctx.packed, ctx.codec, x.shape[-1], dy.dtype)
            dx = matmul_fp32_accumulate(torch.matmul, dy, weight)
        if any(ctx.needs_input_grad[2:6]):
            grad, inputs = (t.to(ctx.work).flatten(0, -2) for t in (dy, x))
            dA, dB = _compute_factor_gradients(ctx, grad, inputs, ctx.A, ctx.B)
            if ctx.zero_A is not None:
                sums = _sum_groups(inputs, ctx.group_size)
                dzA, dzB = _compute_factor_gradients(ctx, grad, sums, ctx.zero_A, ctx.zero_B)
        return dx, None, dA, dB, dzA, dzB, None, None, None, None


def _compute_factor_gradients(
    ctx: Any, grad: Tensor, inputs: Tensor, A: Tensor, B: Tensor
) -> tuple[Tensor, Tensor]:
    """``s (dy B)^T x`` and ``s dy^T (x A^T)`` of ``dy`` [n, out] and ``x`` [n, columns of A]."""
    inner = functional.linear(inputs, A.to(ctx.work)).mul_(ctx.scaling)
    # [r, out] first: with few rows a product of such a shape is faster on a CPU
    dB = (inner.T @ grad).T.to(B.dtype)
    inner = (grad @ B.to(ctx.work)).mul_(ctx.scaling)
    return (inner.T @ inputs).to(A.dtype), dB


def _sum_groups(x: Tensor, size: int) -> Tensor:
    """Sums of ``size`` neighbours: ``[n, in]`` -> ``[n, ceil(in / size)]``."""
    padded = functional.pad(x, (0, -x.shape[-1] % size))
    return padded.view(len(padded), -1, size).sum(-1)
