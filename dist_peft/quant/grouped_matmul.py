"""``x W_e^T`` with each row's own frozen, packed ``W_e``: the products of a mixture's experts.

    rows of x   | expert 0 | expert 2 ...|      sorted by expert
    packed      [experts * out, row_bytes]      only the rows of experts that have any x are
    dequantized

As in ``quant.frozen_matmul``, the *packed tensor object* is kept for backward, and dequantized
again there; nothing dequantized outlives a product.

Experts are dequantized several at a time: for small ones the calls cost more than the numbers. On a
CPU these are so few that they stay in the cache and in memory that the allocator has already, as
fresh pages cost more than the decode; a GPU takes what fills it. On a GPU the products of those
experts are one call of PyTorch's grouped product, whose offsets are a tensor; a trial of a few
numbers decides whether the device and type have it and get it right. A CPU multiplies expert by
expert: nothing waits there, and the bits are those of one product each.
"""

import functools
import logging
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from dist_peft.core.span import Span
from dist_peft.quant.assumed_device import get_assumed_device
from dist_peft.quant.codec import Codec
from dist_peft.quant.frozen_matmul import check_packed_storage, matmul_fp32_accumulate
from dist_peft.quant.kept_results import keep_result
from dist_peft.quant.shared_decodes import get_block_decodes, hold_decode, take_decode

__all__ = [
    "RowGroups",
    "can_group_products",
    "count_sorted",
    "frozen_grouped_matmul",
    "has_grouped_product",
    "multiply_in_one",
]

log = logging.getLogger("dist_peft")

_CHUNK_ELEMENTS = {"cpu": 2**16, "cuda": 2**26}
"""Most weights that are dequantized at a time: 256 KiB of float32, or 128 MiB in 16 bits. An
expert of more is dequantized alone."""

_ALIGN_BYTES = 16
"""Rows of operands of PyTorch's grouped product begin at a multiple."""


@dataclass(frozen=True)
class RowGroups:
    """Which rows of a matrix, sorted by expert, are each expert's.

    Attributes:
        counts: rows by expert, known on the host.
        used: experts that have rows, in order, with these.
        tokens: the token of each row, long ``[n]``; None: not known.
        num_tokens: of the micro-batch.
        keys: int32 ``[n, 2]``, by which dropout drops elements of the rows' tokens
            (``model.sample_dropout``), where these are another rank's; None: ``tokens`` are known.
    """

    counts: tuple[int, ...]
    used: tuple[tuple[int, Span], ...]
    tokens: Tensor | None = field(default=None, compare=False)
    num_tokens: int = field(default=0, compare=False)
    keys: Tensor | None = field(default=None, compare=False)

    @classmethod
    def from_counts(cls, counts: Sequence[int]) -> "RowGroups":
        """Make the groups of ``counts`` [E] rows."""
        used, first = [], 0
        for expert, count in enumerate(counts):
            if count:
                used.append((expert, Span(first, first + count)))
            first += count
        return cls(tuple(counts), tuple(used))

    @classmethod
    def read_counts(cls, counts: Tensor, assumed_rows: int) -> "RowGroups":
        """Make the groups of ``counts``, long ``[E]``: one copy to the host.

        Args:
            assumed_rows: of all experts where a device is assumed (``quant.assumed_device``), as
                numbers have no values there.
        """
        if get_assumed_device() is not None:
            return cls.assume_shares(assumed_rows, Span(0, len(counts)), len(counts))
        found: list[int] = counts.tolist()
        return cls.from_counts(found)

    @classmethod
    def assume_shares(cls, num_rows: int, own: Span, experts: int) -> "RowGroups":
        """Make groups in which four of the experts ``own`` or fewer have equal shares."""
        used = min(len(own), 4)
        shares = [num_rows * (i + 1) // used - num_rows * i // used for i in range(used)]
        return cls.from_counts([0] * own.start + shares + [0] * (experts - own.start - used))

    def select(self, experts: Span) -> "RowGroups":
        """Return the groups of ``experts`` alone, which have all rows; of none: one without."""
        return RowGroups.from_counts(self.counts[experts.slice] or (0,))

    def with_tokens(self, tokens: Tensor, count: int) -> "RowGroups":
        """Return the same groups with the token of each row, of ``count`` in all."""
        return replace(self, tokens=tokens, num_tokens=count)

    def with_keys(self, keys: Tensor | None) -> "RowGroups":
        """Return the same groups with the keys of each row's token."""
        return replace(self, keys=keys)

    @property
    def num_rows(self) -> int:
        """Rows of all experts."""
        return self.used[-1][1].stop if self.used else 0

    def split_into_chunks(self, most: int) -> Iterator[tuple[tuple[int, Span], ...]]:
        """Yield ``used`` in parts of at most ``most`` experts."""
        for first in range(0, len(self.used), most):
            yield self.used[first : first + most]


def count_sorted(chosen: Tensor, experts: int) -> Tensor:
    """Count the rows of each expert, long ``[E]``, in their ``chosen`` experts [n], ascending."""
    ids = torch.arange(experts, device=chosen.device)
    ends = torch.searchsorted(chosen, ids, right=True)
    return ends.diff(prepend=ends.new_zeros(1))


def frozen_grouped_matmul(
    x: Tensor, packed: Tensor, codec: Codec, in_features: int, groups: RowGroups
) -> Tensor:
    """``x W_e^T`` with each row's own ``W_e``, differentiable in ``x`` alone.

    Args:
        x: ``[n, in]``, any float type, sorted as ``groups`` says.
        packed: ``uint8 [E * out, row_bytes]``, the weights behind each other; kept for backward as
            by ``frozen_matmul``.
        codec: of ``packed``.
        in_features: columns of each weight.
        groups: rows of ``x`` by weight; their sum is ``n``.

    Returns:
        ``[n, out]`` in the type of ``x``.

    Raises:
        ValueError: shapes or types do not fit.
        RuntimeError: the bytes of ``packed`` are not there (its engine has freed them).
    """
    if not x.is_floating_point() or x.shape != (groups.num_rows, in_features):
        raise ValueError(
            f"x is floating point [{groups.num_rows}, {in_features}], not {x.dtype} {list(x.shape)}"
        )
    if packed.shape[0] % len(groups.counts):
        raise ValueError(f"{packed.shape[0]} packed rows are no {len(groups.counts)} weights")
    result: Tensor = _FrozenGroupedMatmul.apply(x, packed, codec, in_features, groups)
    return result


class _FrozenGroupedMatmul(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, packed: Tensor, codec: Codec, in_features: int, groups: RowGroups
    ) -> Tensor:
        ctx.packed, ctx.codec, ctx.in_features, ctx.groups = packed, codec, in_features, groups
        ctx.decodes = get_block_decodes()

        def multiply() -> Tensor:
            y = x.new_empty(x.shape[0], packed.shape[0] // len(groups.counts))
            provide = partial(hold_decode, is_needed=ctx.needs_input_grad[0])
            operands = (packed, codec, in_features, groups)
            return _multiply_groups(x, *operands, y, provide, transpose=True)

        return keep_result("product", multiply)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (grad,) = grads
        dx = grad.new_empty(grad.shape[0], ctx.in_features)
        operands = (ctx.packed, ctx.codec, ctx.in_features, ctx.groups)
        provide = partial(take_decode, ctx.decodes)
        dx = _multiply_groups(grad, *operands, dx, provide, transpose=False)
        return dx, None, None, None, None


def _multiply_groups(
    x: Tensor,
    packed: Tensor,
    codec: Codec,
    in_features: int,
    groups: RowGroups,
    result: Tensor,
    provide: Callable[[Tensor, Hashable, Callable[[], Tensor]], Tensor],
    *,
    transpose: bool,
) -> Tensor:
    """Fill ``result`` with ``x W_e^T``, or with ``x W_e`` without ``transpose``; return it.

    ``provide`` decodes the weights of some experts or has them (``quant.shared_decodes``).
    """
    if groups.used:  # without rows nothing of it is read
        check_packed_storage(packed)
    out = packed.shape[0] // len(groups.counts)
    kind = (get_assumed_device() or x.device).type
    elements = _CHUNK_ELEMENTS.get(kind, _CHUNK_ELEMENTS["cuda"])
    in_one = can_group_products(x.device, x.dtype, (in_features, out))
    multiply = functional.linear if transpose else torch.matmul
    for chunk in groups.split_into_chunks(max(1, elements // max(1, out * in_features))):
        experts = tuple(expert for expert, _ in chunk)

        def decode(experts: tuple[int, ...] = experts) -> Tensor:
            rows = _take_rows(packed.detach(), out, experts)
            return codec.dequantize_rows(rows, in_features, x.dtype)

        weights = provide(packed, (x.dtype, experts), decode).view(len(chunk), out, -1)
        if in_one:
            part = slice(chunk[0][1].start, chunk[-1][1].stop)
            ends = [own.stop - part.start for _, own in chunk]
            operand = weights.transpose(1, 2) if transpose else weights
            result[part] = multiply_in_one(x[part], operand, ends)
        else:
            for (_, own), weight in zip(chunk, weights.unbind(0), strict=True):
                result[own.slice] = matmul_fp32_accumulate(multiply, x[own.slice], weight)
        del weights
    return result


def _take_rows(packed: Tensor, out: int, experts: Sequence[int]) -> Tensor:
    """Return the packed rows of ``experts``, ascending: a view where they are neighbors."""
    if experts[-1] - experts[0] + 1 == len(experts):
        return packed[experts[0] * out : (experts[-1] + 1) * out]
    return torch.cat([packed[expert * out : (expert + 1) * out] for expert in experts])


def multiply_in_one(x: Tensor, weights: Tensor, ends: Sequence[int]) -> Tensor:
    """PyTorch's grouped product of rows, or of columns.

    Args:
        x: ``[n, k]`` with ``weights`` ``[E, k, m]``: rows before ``ends[e]`` of expert ``e``; or
            ``[k, n]`` with ``weights`` ``[n, m]``, whose sums over ``n`` are cut in this way.
        ends: of each expert, ascending.

    Returns:
        ``[n, m]``; or ``[E, k, m]``.
    """
    offsets = torch.tensor(ends, dtype=torch.int32, device=x.device)
    result: Tensor = functional.grouped_mm(x, weights, offs=offsets)
    return result


def can_group_products(device: torch.device, dtype: torch.dtype, widths: Sequence[int]) -> bool:
    """Whether one call multiplies all groups of operands whose rows have ``widths`` elements."""
    if device.type == "cpu" or any(width * dtype.itemsize % _ALIGN_BYTES for width in widths):
        return False
    return has_grouped_product(device.type, dtype)


@functools.cache
@torch.no_grad()
def has_grouped_product(device_type: str, dtype: torch.dtype) -> bool:
    """Whether PyTorch's grouped product works with ``dtype`` on such a device: of rows with
    matrices, in both directions, and of columns, which gives the gradients of matrices.

    A trial with three groups, one of them empty (but for columns), against a product each. A trial
    that fails is logged with its reason, once for a device and type.
    """
    generator = torch.Generator().manual_seed(0)
    x, weights = (
        torch.randn(size, generator=generator).to(device_type, dtype)
        for size in ((24, 32), (3, 64, 32))
    )
    tolerance = 1e-5 if dtype.itemsize == 4 else 2e-2
    try:
        y = multiply_in_one(x, weights.transpose(1, 2), [8, 8, 24])
        dx = multiply_in_one(y, weights, [8, 8, 24])
        sums = multiply_in_one(y.t(), x, [8, 24])
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        _explain_single_products(device_type, dtype, str(error))
        return False
    single = torch.cat([x[:8] @ weights[0].T, x[8:] @ weights[2].T])
    back = torch.cat([y[:8] @ weights[0], y[8:] @ weights[2]])
    added = torch.stack([y[:8].T @ x[:8], y[8:].T @ x[8:]])
    for got, wanted in ((y, single), (dx, back), (sums, added)):
        largest = float(wanted.float().abs().max())
        difference = float((got.float() - wanted.float()).abs().max())
        if not difference <= tolerance * largest:
            reason = f"its results differ by {difference:.1e} of {largest:.1e}"
            _explain_single_products(device_type, dtype, reason)
            return False
    return True


def _explain_single_products(device_type: str, dtype: torch.dtype, reason: str) -> None:
    log.warning(
        "experts are multiplied one at a time, as PyTorch's grouped product of %s does not work on "
        "%s: %s",
        str(dtype).removeprefix("torch."),
        device_type,
        reason.strip().partition("\n")[0] or "no reason given",
    )
