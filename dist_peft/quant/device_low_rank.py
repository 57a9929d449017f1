"""Products with low-rank factors on a GPU, one launch each, dropout included.

With tokens ``t``, columns ``k`` and ranks ``r``, and ``keep`` the dropout of
``model.sample_dropout`` (``x / (1 - p)``, or 0)::

    project_rows   u[t, r]  = s sum_k keep(x)[t, k] M[r, k]        s A drop(x), s dy B
    expand_rows    y[t, k] += keep(sum_r u[t, r] M[k, r])          y + B u, dx + drop'(u A)
    sum_outer      G[r, k]  = sum_t u[t, r] keep(x)[t, k]          dA, dB

Four uses each of one linear's step, and no other launch: float32 factors are rounded to the type of
``x`` as they are loaded, ``s`` multiplies the float32 sum, gradients of factors are written in
float32, and what dropout keeps is computed from its keys where ``x`` is loaded, so that neither
the dropped ``x`` nor a mask is ever in memory. ``u`` may be columns of a wider matrix, as of
linears that share their input.

Sums are float32 in a fixed order, without atomic additions: the same bits in every run. They are
not those of torch's products, whose order is another one. A kept element is rounded as by torch.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dist_peft.quant.device import EXACT_OPTIONS, enter_device
from dist_peft.quant.low_rank_linear import DropoutKeys

__all__ = ["expand_rows", "project_rows", "sum_outer"]

_TOKENS = 32


@triton.jit
def _keep_elements(x, token, column, inside, a, c, b, d, threshold, probability):
    """Zero dropped elements and divide the others, rounded to the type of ``x``."""
    token_inside, column_inside = inside
    left = tl.load(a + token, mask=token_inside, other=0)[:, None]
    shift = tl.load(c + token, mask=token_inside, other=0)[:, None]
    right = tl.load(b + column, mask=column_inside, other=0)[None, :]
    offset = tl.load(d + column, mask=column_inside, other=0)[None, :]
    word = left * right + offset
    word = word * word + shift
    wide = x.to(tl.float32)
    divided = tl.div_rn(wide, tl.zeros(wide.shape, tl.float32) + probability)
    return tl.where(word >= threshold, divided, 0.0).to(x.dtype)


@triton.jit
def _project_kernel(
    x, row_stride, factor, rank_stride, column_stride, inner, inner_stride,
    tokens, columns, rank, scaling, a, c, b, d, threshold, probability,
    DROPS: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    r = tl.arange(0, RANK)
    total = tl.zeros((TOKENS, RANK), tl.float32)
    rows = x + token.to(tl.int64)[:, None] * row_stride
    for start in range(0, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = (token < tokens)[:, None] & (column < columns)[None, :]
        part = tl.load(rows + column[None, :], mask=inside, other=0.0)
        if DROPS:
            masks = (token < tokens, column < columns)
            part = _keep_elements(part, token, column, masks, a, c, b, d, threshold, probability)
        place = factor + r[None, :] * rank_stride + column[:, None] * column_stride
        known = (column < columns)[:, None] & (r < rank)[None, :]
        weights = tl.load(place, mask=known, other=0.0).to(part.dtype)
        total = tl.dot(part, weights, total, input_precision="ieee")
    target = inner + token.to(tl.int64)[:, None] * inner_stride + r[None, :]
    known = (token < tokens)[:, None] & (r < rank)[None, :]
    tl.store(target, (total * scaling).to(inner.dtype.element_ty), mask=known)


@triton.jit
def _expand_kernel(
    y, inner, inner_stride, factor, rank_stride, column_stride, tokens, columns, rank,
    a, c, b, d, threshold, probability,
    DROPS: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    r = tl.arange(0, RANK)
    place = inner + token.to(tl.int64)[:, None] * inner_stride + r[None, :]
    known = (token < tokens)[:, None] & (r < rank)[None, :]
    part = tl.load(place, mask=known, other=0.0)
    place = factor + r[:, None] * rank_stride + column[None, :] * column_stride
    known = (r < rank)[:, None] & (column < columns)[None, :]
    weights = tl.load(place, mask=known, other=0.0).to(part.dtype)
    change = tl.dot(part, weights, input_precision="ieee")
    if DROPS:
        change = change.to(y.dtype.element_ty)
        masks = (token < tokens, column < columns)
        change = _keep_elements(change, token, column, masks, a, c, b, d, threshold, probability)
    target = y + token.to(tl.int64)[:, None] * columns + column[None, :]
    inside = (token < tokens)[:, None] & (column < columns)[None, :]
    total = tl.load(target, mask=inside, other=0.0).to(tl.float32) + change.to(tl.float32)
    tl.store(target, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _outer_kernel(
    inner, inner_stride, x, row_stride, gradient, rank_stride, column_stride,
    tokens, columns, rank, a, c, b, d, threshold, probability,
    DROPS: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    r = tl.arange(0, RANK)
    total = tl.zeros((RANK, COLUMNS), tl.float32)
    for start in range(0, tokens, TOKENS):
        token = start + tl.arange(0, TOKENS)
        inside = (token < tokens)[:, None] & (column < columns)[None, :]
        rows = x + token.to(tl.int64)[:, None] * row_stride
        part = tl.load(rows + column[None, :], mask=inside, other=0.0)
        if DROPS:
            masks = (token < tokens, column < columns)
            part = _keep_elements(part, token, column, masks, a, c, b, d, threshold, probability)
        place = inner + token.to(tl.int64)[None, :] * inner_stride + r[:, None]
        known = (token < tokens)[None, :] & (r < rank)[:, None]
        total = tl.dot(tl.load(place, mask=known, other=0.0), part, total, input_precision="ieee")
    target = gradient + r[:, None] * rank_stride + column[None, :] * column_stride
    known = (r < rank)[:, None] & (column < columns)[None, :]
    tl.store(target, total.to(gradient.dtype.element_ty), mask=known)


def project_rows(
    x: Tensor,
    factor: Tensor,
    scaling: float,
    keys: DropoutKeys | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """``s M keep(x)``.

    Args:
        x: ``[tokens, columns]``, float32, bfloat16 or float16.
        factor: ``M``, ``[rank, columns]`` at any strides, any float type.
        scaling: ``s``.
        keys: of dropout; None keeps everything.
        out: the result's place, columns of a matrix; None: a new one.

    Returns:
        ``[tokens, rank]`` in the type of ``x``.
    """
    x = x if x.stride(1) == 1 else x.contiguous()
    (tokens, columns), rank = x.shape, factor.shape[0]
    inner = torch.empty(tokens, rank, dtype=x.dtype, device=x.device) if out is None else out
    with enter_device(x):
        _project_kernel[(triton.cdiv(tokens, _TOKENS),)](
            x, x.stride(0), factor, *factor.stride(), inner, inner.stride(0),
            tokens, columns, rank, scaling, *_list_keys(keys, x), **_choose_blocks(rank, keys),
        )  # fmt: skip
    return inner


def expand_rows(
    y: Tensor, inner: Tensor, factor: Tensor, keys: DropoutKeys | None = None
) -> Tensor:
    """``y += keep(M u)``, in place.

    Args:
        y: ``[tokens, columns]``, contiguous.
        inner: ``u``, ``[tokens, rank]`` in the type of ``y``, or such columns of a matrix.
        factor: ``M``, ``[columns, rank]`` at any strides, any float type.
        keys: of dropout; None keeps everything.

    Returns:
        ``y``.
    """
    (tokens, columns), rank = y.shape, factor.shape[1]
    blocks = _choose_blocks(rank, keys)
    grid = (triton.cdiv(tokens, _TOKENS), triton.cdiv(columns, blocks["COLUMNS"]))
    column_stride, rank_stride = factor.stride()
    with enter_device(y):
        _expand_kernel[grid](
            y, inner, inner.stride(0), factor, rank_stride, column_stride, tokens, columns, rank,
            *_list_keys(keys, y), **blocks,
        )  # fmt: skip
    return y


def sum_outer(inner: Tensor, x: Tensor, gradient: Tensor, keys: DropoutKeys | None = None) -> None:
    """``G = u^T keep(x)``.

    Args:
        inner: ``u``, ``[tokens, rank]``, or such columns of a matrix.
        x: ``[tokens, columns]`` in the type of ``u``.
        gradient: ``G``, ``[rank, columns]`` at any strides, filled here.
        keys: of dropout; None keeps everything.
    """
    x = x if x.stride(1) == 1 else x.contiguous()
    (tokens, columns), rank = x.shape, inner.shape[1]
    blocks = _choose_blocks(rank, keys)
    with enter_device(x):
        _outer_kernel[(triton.cdiv(columns, blocks["COLUMNS"]),)](
            inner, inner.stride(0), x, x.stride(0), gradient, *gradient.stride(),
            tokens, columns, rank, *_list_keys(keys, x), **blocks,
        )  # fmt: skip


def _list_keys(keys: DropoutKeys | None, x: Tensor) -> tuple[object, ...]:
    """Arguments of a kernel; without dropout any pointers, which nothing reads."""
    return (x, x, x, x, 0, 1.0) if keys is None else tuple(keys)


def _choose_blocks(rank: int, keys: DropoutKeys | None) -> dict[str, Any]:
    """Sizes of a program: at most 64 registers a thread, nothing spilled, on sm_80 to sm_100."""
    ranks = max(16, triton.next_power_of_2(rank))
    return {
        "DROPS": keys is not None,
        "TOKENS": _TOKENS,
        "COLUMNS": 64 if ranks <= 32 else 32,
        "RANK": ranks,
        "num_warps": 8 if ranks <= 64 else 16,
        **EXACT_OPTIONS,
    }
