"""A frozen linear with its low-rank change as one function, for a GPU's fused kernels.

    y  = x W^T + s (keep(x) A^T) B^T         keep: dropout, on the input of the change alone

Composed of ``quant.frozen_matmul``, ``quant.trainable_products`` and dropout each direction has
casts of factors, masks, scalings and sums of its own. Here a direction is a few launches::

    forward    W = decode   y = x W^T   u = s keep(x) A^T     y += u B^T                         4
    backward   W = decode   dx = dy W   v = s dy B            dx += keep(v A)
                                        dA = v^T keep(x)      dB = dy^T u                        6

and with activation checkpointing, where forward runs twice, 14. Between forward and backward ``x``
and ``u`` are kept, the latter ``r`` numbers a token; the dropped ``x`` and its mask are not.

Linears that share their input, as queries, keys and values do, share its products: their ``A`` are
one matrix, ``x`` is read once for all ``u`` and once for all ``dA``, and their ``dx`` is one sum.
``n`` linears, a copy of the joined ``A`` in each direction included::

    forward    cat A   u = s x A^T    n (decode, y = x W^T, y += u B^T)                       3n + 2
    backward   n (dB, v, decode, dx += dy W)    dA    cat A    dx += v A                      4n + 3

in place of ``4n`` and ``6n``, and ``n - 1`` sums of ``dx``. With dropout each drops other elements
of ``x``, and they stay apart.

There are two autograd nodes. The first one computes and saves ``u`` before the frozen product:
recomputation under activation checkpointing stops at the last tensor that is saved, and so leaves
out the product of a block's last linear. The second one has all gradients, and takes the saved
tensors from the first one's node.

Sums have another order than those of torch, so that results agree up to rounding. Factors are kept
as objects, as in ``quant.trainable_products``.
"""

import importlib
from collections.abc import Sequence
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from dist_peft.quant.codec import Codec
from dist_peft.quant.device_choice import is_device_path, is_trusted
from dist_peft.quant.frozen_matmul import hold_weight, take_weight
from dist_peft.quant.kept_results import keep_result
from dist_peft.quant.shared_decodes import get_block_decodes

__all__ = [
    "LARGEST_RANK",
    "DropoutKeys",
    "FrozenLowRank",
    "apply_frozen_low_rank",
    "can_fuse_low_rank",
]

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


class FrozenLowRank(NamedTuple):
    """A frozen weight and the factors of its change.

    Attributes:
        packed: ``uint8 [out, row_bytes]``; kept for backward.
        codec: of ``packed``.
        A, B: ``[r, in]``, ``[out, r]``, float32.
    """

    packed: Tensor
    codec: Codec
    A: Tensor
    B: Tensor


def apply_frozen_low_rank(
    x: Tensor, linears: Sequence[FrozenLowRank], scaling: float, keys: DropoutKeys | None = None
) -> tuple[Tensor, ...]:
    """``x W^T + s (keep(x) A^T) B^T`` of each linear, differentiable in ``x`` and the factors.

    Args:
        x: ``[..., in]``, float32, bfloat16 or float16; the arithmetic is of this type.
        linears: of one rank; several have at most ``LARGEST_RANK`` in all, and no dropout.
        scaling: ``s``.
        keys: of dropout; None keeps everything.

    Returns:
        ``[..., out]`` of each, in the type of ``x``.

    Raises:
        RuntimeError: packed bytes are not there (their engine has freed them).
    """
    assert keys is None or len(linears) == 1, "each linear drops other elements"
    factors = (*(linear.A for linear in linears), *(linear.B for linear in linears))
    inner = _SavedProjection.apply(x, scaling, keys, *factors)
    outputs: tuple[Tensor, ...] = _FrozenLowRank.apply(
        x, inner, tuple(linears), scaling, keys, *factors
    )
    return outputs


class _SavedProjection(torch.autograd.Function):
    """``s keep(x) A^T``, and the place where ``x`` and the result are saved."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scaling: float, keys: DropoutKeys | None, *factors: Tensor
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.num_factors = len(factors)
        rows, project = x.reshape(-1, x.shape[-1]), _import_kernels().project_rows
        A = factors[: len(factors) // 2]
        inner: Tensor = keep_result("inner", lambda: project(rows, _join(A), scaling, keys))
        ctx.save_for_backward(x, inner)
        return inner

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[None, ...]:
        assert grads == (None,), "the gradients are those of _FrozenLowRank"
        nothing: list[None] = [None] * (3 + ctx.num_factors)
        return tuple(nothing)


class _FrozenLowRank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        inner: Tensor,
        linears: tuple[FrozenLowRank, ...],
        scaling: float,
        keys: DropoutKeys | None,
        *factors: Tensor,
    ) -> tuple[Tensor, ...]:
        # None where nothing needs a gradient: torch then drops ctx with the call
        ctx.saving_node = inner.grad_fn
        ctx.linears, ctx.scaling, ctx.keys = linears, scaling, keys
        ctx.decodes = get_block_decodes()
        rows, needs_x = x.reshape(-1, x.shape[-1]), ctx.needs_input_grad[0]
        parts = inner.split(inner.shape[1] // len(linears), 1)

        def multiply(linear: FrozenLowRank, part: Tensor) -> Tensor:
            packed, codec = linear.packed, linear.codec
            weight = hold_weight(packed, codec, x.shape[-1], x.dtype, needs_x)
            y = functional.linear(rows, weight)
            _import_kernels().expand_rows(y, part, linear.B)
            return y

        products = [
            keep_result("product", partial(multiply, linear, part))
            for linear, part in zip(linears, parts, strict=True)
        ]
        return tuple(y.view(*x.shape[:-1], y.shape[1]) for y in products)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outer: Tensor) -> tuple[Any, ...]:
        kernels, linears, keys = _import_kernels(), ctx.linears, ctx.keys
        count, needs = len(linears), ctx.needs_input_grad
        needs_A, needs_B = needs[5 : 5 + count], needs[5 + count :]
        x, inner = ctx.saving_node.saved_tensors
        rows = x.reshape(-1, x.shape[-1])
        grads = [grad.reshape(-1, grad.shape[-1]) for grad in outer]
        rank = inner.shape[1] // count
        dx, dA = None, [None] * count
        dB: list[Tensor | None] = [None] * count
        for n, part in enumerate(inner.split(rank, 1)):
            if needs_B[n]:
                gradient = dB[n] = torch.empty_like(linears[n].B)
                kernels.sum_outer(part, grads[n], gradient.T)
        if needs[0] or any(needs_A):
            rank_grad = torch.empty_like(inner)
            for n, part in enumerate(rank_grad.split(rank, 1)):
                kernels.project_rows(grads[n], linears[n].B.T, ctx.scaling, out=part)
            if any(needs_A):
                joined = linears[0].A.new_empty(count * rank, x.shape[-1])
                kernels.sum_outer(rank_grad, rows, joined, keys)
                dA = [
                    own if needed else None
                    for own, needed in zip(joined.split(rank), needs_A, strict=True)
                ]
            if needs[0]:
                dx = _multiply_back(ctx, grads, x)
                kernels.expand_rows(dx, rank_grad, _join([one.A for one in linears]).T, keys)
                dx = dx.view(x.shape)
        return dx, None, None, None, None, *dA, *dB


def _multiply_back(ctx: Any, grads: list[Tensor], x: Tensor) -> Tensor:
    """Return the sum of ``dy W`` of all linears ``[tokens, in]``."""
    total: Tensor | None = None
    for linear, grad in zip(ctx.linears, grads, strict=True):
        weight = take_weight(ctx.decodes, linear.packed, linear.codec, x.shape[-1], x.dtype)
        total = grad @ weight if total is None else total.addmm_(grad, weight)
    assert total is not None
    return total


def _join(factors: Sequence[Tensor]) -> Tensor:
    return factors[0] if len(factors) == 1 else torch.cat(tuple(factors))
