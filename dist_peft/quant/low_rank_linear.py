"""A frozen linear with its low-rank change as one function, for a GPU's fused kernels.

    y  = x W^T + s (keep(x) A^T) B^T         keep: dropout, on the input of the change alone

Composed of ``quant.frozen_matmul``, ``quant.trainable_products`` and dropout each direction has
casts of factors, masks, scalings and sums of its own. Here a direction is a few launches::

    forward    W = decode   y = x W^T   u = s keep(x) A^T     y += u B^T                         4
    backward   W = decode   dx = dy W   v = s dy B            dx += keep(v A)
                                        dA = v^T keep(x)      dB = dy^T u                        6

and with activation checkpointing, where forward runs twice, 14. Between forward and backward ``x``
and ``u`` are kept, the latter ``r`` numbers a token; the dropped ``x`` and its mask are not.

There are two autograd nodes. The first one computes and saves ``u`` before the frozen product:
recomputation under activation checkpointing stops at the last tensor that is saved, and so leaves
out the product of a block's last linear. The second one has all gradients, and takes the saved
tensors from the first one's node.

Sums have another order than those of torch, so that results agree up to rounding. Factors are kept
as objects, as in ``quant.trainable_products``.
"""

import importlib
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from dist_peft.quant.codec import Codec
from dist_peft.quant.device_choice import is_device_path, is_trusted
from dist_peft.quant.frozen_matmul import dequantize_weight
from dist_peft.quant.kept_results import keep_result

__all__ = ["DropoutKeys", "apply_frozen_low_rank", "can_fuse_low_rank"]

LARGEST_RANK = 128
"""Ranks that a program of ``quant.device_low_rank`` holds."""

_TYPES = (torch.bfloat16, torch.float16)
"""Types whose products run on tensor cores; for float32 the kernels would gain nothing."""


class DropoutKeys(NamedTuple):
    """Which elements are kept: those with ``(a b + d)^2 + c >= threshold`` in 32 bits.

    Attributes:
        a, c: int32 ``[tokens, 1]``.
        b, d: int32 ``[columns]``.
        threshold: int32.
        probability: of being kept, which kept elements are divided by.
    """

    a: Tensor
    c: Tensor
    b: Tensor
    d: Tensor
    threshold: int
    probability: float


def can_fuse_low_rank(x: Tensor, rank: int, dtype: torch.dtype) -> bool:
    """Return whether ``apply_frozen_low_rank`` has kernels for ``x`` (``quant.device_choice``).

    Args:
        x: input of the linear, bfloat16 or float16.
        rank: of the change.
        dtype: arithmetic type of the change, which has to be that of ``x``.

    Raises:
        UserError: ``DIST_PEFT_KERNELS`` is unknown, or asks for a missing package.
    """
    if x.dtype != dtype or dtype not in _TYPES or rank > LARGEST_RANK:
        return False
    if not is_device_path(x, dtype):
        return False
    return x.numel() > 0 and _is_product_trusted(x)


def _is_product_trusted(x: Tensor) -> bool:
    """A trial on small integers, whose sums are exact in any order."""

    def make_factor() -> Tensor:
        return (torch.arange(8 * 96, device=x.device) % 7 - 3).view(8, 96).float()

    def multiply_by_device(some: Tensor) -> Tensor:
        product: Tensor = _import_kernels().project_rows(some, make_factor(), 1.0)
        return product

    key = ("low-rank product", x.dtype, x.device)
    return is_trusted(
        key,
        lambda: (torch.arange(8 * 96, device=x.device) % 5 - 2).view(8, 96).to(x.dtype),
        multiply_by_device,
        lambda some: (some.float() @ make_factor().T).to(x.dtype),
    )


def _import_kernels() -> ModuleType:
    return importlib.import_module("dist_peft.quant.device_low_rank")


def apply_frozen_low_rank(
    x: Tensor,
    packed: Tensor,
    codec: Codec,
    A: Tensor,
    B: Tensor,
    scaling: float,
    keys: DropoutKeys | None,
) -> Tensor:
    """``x W^T + s (keep(x) A^T) B^T``, differentiable in ``x``, ``A`` and ``B``.

    Args:
        x: ``[..., in]``, float32, bfloat16 or float16; the arithmetic is of this type.
        packed: ``uint8 [out, row_bytes]``; kept for backward.
        codec: of ``packed``.
        A, B: ``[r, in]``, ``[out, r]``, float32.
        scaling: ``s``.
        keys: of dropout; None keeps everything.

    Returns:
        ``[..., out]`` in the type of ``x``.

    Raises:
        RuntimeError: the bytes of ``packed`` are not there (its engine has freed them).
    """
    inner = _SavedProjection.apply(x, A, B, scaling, keys)
    y: Tensor = _FrozenLowRank.apply(x, inner, A, B, packed, codec, scaling, keys)
    return y


class _SavedProjection(torch.autograd.Function):
    """``s keep(x) A^T``, and the place where ``x`` and the result are saved."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, A: Tensor, B: Tensor, scaling: float, keys: DropoutKeys | None
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        rows, project = x.reshape(-1, x.shape[-1]), _import_kernels().project_rows
        inner: Tensor = keep_result("inner", lambda: project(rows, A, scaling, keys))
        ctx.save_for_backward(x, inner)
        return inner

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[None, ...]:
        assert grads == (None,), "the gradients are those of _FrozenLowRank"
        return None, None, None, None, None


class _FrozenLowRank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        inner: Tensor,
        A: Tensor,
        B: Tensor,
        packed: Tensor,
        codec: Codec,
        scaling: float,
        keys: DropoutKeys | None,
    ) -> Tensor:
        # None where nothing needs a gradient: torch then drops ctx with the call
        ctx.saving_node = inner.grad_fn
        ctx.A, ctx.B, ctx.packed, ctx.codec = A, B, packed, codec
        ctx.scaling, ctx.keys = scaling, keys

        def multiply() -> Tensor:
            weight = dequantize_weight(packed, codec, x.shape[-1], x.dtype)
            y = functional.linear(x.reshape(-1, x.shape[-1]), weight)
            _import_kernels().expand_rows(y, inner, B)
            return y

        y = keep_result("product", multiply)
        return y.view(*x.shape[:-1], y.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        kernels, A, B, keys = _import_kernels(), ctx.A, ctx.B, ctx.keys
        need_x, _, need_A, need_B = ctx.needs_input_grad[:4]
        x, inner = ctx.saving_node.saved_tensors
        rows, grad = x.reshape(-1, x.shape[-1]), grads[0].reshape(-1, grads[0].shape[-1])
        dx = dA = dB = None
        if need_B:
            dB = torch.empty_like(B)
            kernels.sum_outer(inner, grad, dB.T)
        if need_x or need_A:
            rank_grad = kernels.project_rows(grad, B.T, ctx.scaling)
            if need_A:
                dA = torch.empty_like(A)
                kernels.sum_outer(rank_grad, rows, dA, keys)
            if need_x:
                dx = grad @ dequantize_weight(ctx.packed, ctx.codec, x.shape[-1], x.dtype)
                kernels.expand_rows(dx, rank_grad, A.T, keys)
                dx = dx.view(x.shape)
        return dx, None, dA, dB, None, None, None, None
