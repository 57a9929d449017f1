"""Products of 16-bit activations with trainable float32 weights, differentiable in all of them.

Adapters keep float32 parameters and compute in the arithmetic type of the run. Which product that
is depends on the processor (``quant.cpu_products``)::

    16-bit products pay      weights cast to the type; each product rounded to it
    they do not (some CPUs)  everything in float32, weights as they are; one rounding at the end

forward and backward alike. Activations are kept for backward in their own type in both ways, so
that the second one needs no more memory between the two.

The low-rank products keep their factors as objects, not by ``save_for_backward``: engines free them
after forward and fill them again before backward (see ``quant.frozen_matmul``).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from dist_peft.quant.cpu_products import has_fast_product
from dist_peft.quant.kept_results import keep_result

__all__ = ["apply_linear", "apply_low_rank", "apply_scaled_projections", "multiply_batched"]


def apply_low_rank(x: Tensor, A: Tensor, B: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """``s B A x``, the change by low-rank factors.

    Args:
        x: ``[..., in]``, any float type.
        A, B: ``[r, in]``, ``[out, r]``, float32.
        scaling: ``s``.
        dtype: arithmetic type.

    Returns:
        ``[..., out]`` in ``dtype``.
    """
    change: Tensor = _LowRankProduct.apply(x, A, B, scaling, dtype)
    return change


class _LowRankProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, A: Tensor, B: Tensor, scaling: float, dtype: torch.dtype
    ) -> Tensor:
        ctx.A, ctx.B, ctx.scaling = A, B, scaling
        work = dtype if has_fast_product(x.device, dtype) else torch.float32
        rows = x.reshape(-1, x.shape[-1])

        def project() -> Tensor:
            return (rows.to(work) @ A.to(work).t()).mul_(scaling)

        inner = keep_result("inner", project)
        ctx.save_for_backward(x, inner)
        change = (inner @ B.to(work).t()).to(dtype)
        return change.view(*x.shape[:-1], change.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, inner = ctx.saved_tensors
        need_x, need_A, need_B = ctx.needs_input_grad[:3]
        dtype = inner.dtype
        grad = grads[0].to(dtype).flatten(0, -2)
        dx = dA = dB = None
        if need_B:
            # [r, out] first: with few rows a product of such a shape is twice as fast on a CPU
            dB = (inner.t() @ grad).t().to(ctx.B.dtype)
        if need_x or need_A:
            inner_grad = (grad @ ctx.B.to(dtype)).mul_(ctx.scaling)
            if need_A:
                dA = (inner_grad.t() @ x.flatten(0, -2).to(dtype)).to(ctx.A.dtype)
            if need_x:
                dx = (inner_grad @ ctx.A.to(dtype)).view(x.shape).to(x.dtype)
        return dx, dA, dB, None, None


def apply_scaled_projections(
    x: Tensor, A: Tensor, d: Tensor, B: Tensor, b: Tensor, dtype: torch.dtype
) -> Tensor:
    """``b * (B (d * (A x)))``: frozen projections, of which two vectors scale the outputs.

    Backward needs ``A x`` only, ``r`` numbers a token, and neither ``x`` nor the output.

    Args:
        x: ``[..., in]``, any float type.
        A, B: ``[r, in]``, ``[out, r]``, frozen.
        d, b: ``[r]``, ``[out]``, float32.
        dtype: arithmetic type.

    Returns:
        ``[..., out]`` in ``dtype``.
    """
    change: Tensor = _ScaledProjections.apply(x, A, d, B, b, dtype)
    return change


class _ScaledProjections(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, A: Tensor, d: Tensor, B: Tensor, b: Tensor, dtype: torch.dtype
    ) -> Tensor:
        ctx.A, ctx.d, ctx.B, ctx.b = A, d, B, b
        work = dtype if has_fast_product(x.device, dtype) else torch.float32
        inner = functional.linear(x.to(work), A.to(work))
        ctx.x_like = (x.shape, x.dtype)
        ctx.save_for_backward(inner)
        outer = functional.linear(inner * d.to(work), B.to(work))
        return outer.mul_(b.to(work)).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (inner,) = ctx.saved_tensors
        dtype = inner.dtype
        need_x, _, need_d, _, need_b = ctx.needs_input_grad[:5]
        inner = inner.flatten(0, -2)
        grad = grads[0].to(dtype).flatten(0, -2)
        B, d = ctx.B.to(dtype), ctx.d.to(dtype)
        dx = dd = db = None
        if need_b:
            # sum over tokens of the outputs times their gradients, without the outputs
            products = (inner.T @ grad).T.float()
            db = (products * (ctx.B.float() * ctx.d.float())).sum(1).to(ctx.b.dtype)
        if need_x or need_d:
            rank_grad = (grad * ctx.b.to(dtype)) @ B
            if need_d:
                dd = (rank_grad.float() * inner.float()).sum(0).to(ctx.d.dtype)
            if need_x:
                shape, x_dtype = ctx.x_like
                dx = ((rank_grad * d) @ ctx.A.to(dtype)).view(shape).to(x_dtype)
        return dx, None, dd, None, db, None


def apply_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + b`` in the type of ``x``.

    Args:
        x: ``[..., in]``, any float type.
        weight, bias: ``[out, in]``, ``[out]``, any float type.
    """
    if has_fast_product(x.device, x.dtype):
        cast = None if bias is None else bias.to(x.dtype)
        return functional.linear(x, weight.to(x.dtype), cast)
    y: Tensor = _WideLinear.apply(x, weight, bias)
    return y


class _WideLinear(torch.autograd.Function):
    """A linear that computes in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight = weight
        ctx.bias_type = None if bias is None else bias.dtype
        wide = None if bias is None else bias.float()
        return functional.linear(x.float(), weight.float(), wide).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,), weight = ctx.saved_tensors, ctx.weight
        grad = grads[0].flatten(0, -2).float()
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            dx = (grad @ weight.float()).view(x.shape).to(x.dtype)
        if ctx.needs_input_grad[1]:
            dw = (grad.T @ x.flatten(0, -2).float()).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            db = grad.sum(0).to(ctx.bias_type)
        return dx, dw, db


def multiply_batched(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` of two tensors of one type, ``[*batch, n, k]`` and ``[*batch, k, m]``."""
    if has_fast_product(a.device, a.dtype):
        return a @ b
    y: Tensor = _WideBatchedProduct.apply(a, b)
    return y


class _WideBatchedProduct(torch.autograd.Function):
    """A batched product that computes in float32."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return (a.float() @ b.float()).to(a.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (a, b), grad = ctx.saved_tensors, grads[0].float()
        da = db = None
        if ctx.needs_input_grad[0]:
            da = (grad @ b.float().mT).to(a.dtype)
        if ctx.needs_input_grad[1]:
            db = (a.float().mT @ grad).to(b.dtype)
        return da, db
