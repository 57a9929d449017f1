"""``s B_e A_e x`` with each row's own trainable factors: the low-rank changes of experts.

    rows of x   | expert 0 | expert 2 ...|       sorted by expert
    A           [E * r, in]     rows e r .. e r + r of expert e
    B           [out, r * E]    columns e, E + e, 2 E + e, ...

One autograd node for all experts: that of ``trainable_products.apply_low_rank`` for each of them,
with the same types and, on a CPU, the same bits, as it multiplies expert by expert. On a GPU each
of the six products (two of forward; of backward those that give the gradients of the inner
product, of ``A`` and ``B``, and of ``x``) is one call of PyTorch's grouped product, where sizes
and a trial allow it (``quant.grouped_matmul``). Rows of the gradients of experts without rows are
zeros.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dist_peft.quant.cpu_products import has_fast_product
from dist_peft.quant.grouped_matmul import RowGroups, can_group_products, multiply_in_one
from dist_peft.quant.kept_results import keep_result

__all__ = ["apply_grouped_low_rank"]


def apply_grouped_low_rank(
    x: Tensor, A: Tensor, B: Tensor, groups: RowGroups, scaling: float, dtype: torch.dtype
) -> Tensor:
    """``s B_e A_e x``, differentiable in ``x`` and in the factors of all experts.

    Args:
        x: ``[n, in]``, any float type, sorted as ``groups`` says.
        A, B: ``[E * r, in]``, ``[out, r * E]``, float32; kept as objects for backward.
        groups: rows of ``x`` by expert; their sum is ``n``.
        scaling: ``s``.
        dtype: arithmetic type.

    Returns:
        ``[n, out]`` in ``dtype``.

    Raises:
        ValueError: shapes do not fit.
    """
    experts = len(groups.counts)
    if A.shape[0] % experts or B.shape[1] != A.shape[0]:
        raise ValueError(f"{list(A.shape)} and {list(B.shape)} are no factors of {experts} experts")
    if x.shape != (groups.num_rows, A.shape[1]):
        raise ValueError(f"x is [{groups.num_rows}, {A.shape[1]}], not {list(x.shape)}")
    change: Tensor = _GroupedLowRank.apply(x, A, B, groups, scaling, dtype)
    return change


class _GroupedLowRank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        groups: RowGroups,
        scaling: float,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.A, ctx.B, ctx.groups, ctx.scaling = A, B, groups, scaling
        work = dtype if has_fast_product(x.device, dtype) else torch.float32
        factors = _Factors(A, B, groups, x.device, work)

        def project() -> Tensor:
            return factors.project(x.to(work)).mul_(scaling)

        inner = keep_result("inner", project)
        ctx.save_for_backward(x, inner)
        return factors.expand(inner, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, inner = ctx.saved_tensors
        need_x, need_A, need_B = ctx.needs_input_grad[:3]
        factors = _Factors(ctx.A, ctx.B, ctx.groups, x.device, inner.dtype)
        grad = grads[0].to(inner.dtype)
        dx = dA = dB = None
        if need_B:
            dB = factors.differentiate_B(inner, grad).to(ctx.B.dtype)
        if need_x or need_A:
            inner_grad = factors.contract(grad).mul_(ctx.scaling)
            if need_A:
                dA = factors.differentiate_A(inner_grad, x.to(inner.dtype)).to(ctx.A.dtype)
            if need_x:
                dx = factors.project_back(inner_grad).to(x.dtype)
        return dx, dA, dB, None, None, None


class _Factors:
    """The factors of those experts that have rows, in the type of the products."""

    def __init__(
        self, A: Tensor, B: Tensor, groups: RowGroups, device: torch.device, work: torch.dtype
    ) -> None:
        self.groups, self.work, self.experts = groups, work, len(groups.counts)
        self.r = A.shape[0] // self.experts
        self.A = A.detach().view(self.experts, self.r, -1)
        self.B = B.detach().view(-1, self.r, self.experts)
        self.out = B.shape[0]
        widths = (self.r, A.shape[1], self.out)
        self.in_one = bool(groups.used) and can_group_products(device, work, widths)
        if self.in_one:
            self.ends = [rows.stop for _, rows in groups.used]
            self.ids = torch.tensor([expert for expert, _ in groups.used], device=device)

    def project(self, x: Tensor) -> Tensor:
        """``A_e x``: ``[n, in]`` -> ``[n, r]``."""
        if self.in_one:
            return multiply_in_one(x, self._take_A().mT, self.ends)
        y = x.new_empty(len(x), self.r)
        for expert, rows in self.groups.used:
            y[rows.slice] = x[rows.slice] @ self.A[expert].to(self.work).t()
        return y

    def expand(self, inner: Tensor, dtype: torch.dtype) -> Tensor:
        """``B_e u``: ``[n, r]`` -> ``[n, out]`` in ``dtype``."""
        if self.in_one:
            return multiply_in_one(inner, self._take_B().mT, self.ends).to(dtype)
        y = inner.new_empty(len(inner), self.out, dtype=dtype)
        for expert, rows in self.groups.used:
            y[rows.slice] = inner[rows.slice] @ self._take_one_B(expert).t()
        return y

    def contract(self, grad: Tensor) -> Tensor:
        """``B_e^T g``: ``[n, out]`` -> ``[n, r]``."""
        if self.in_one:
            return multiply_in_one(grad, self._take_B(), self.ends)
        y = grad.new_empty(len(grad), self.r)
        for expert, rows in self.groups.used:
            y[rows.slice] = grad[rows.slice] @ self._take_one_B(expert)
        return y

    def project_back(self, inner_grad: Tensor) -> Tensor:
        """``A_e^T h``: ``[n, r]`` -> ``[n, in]``."""
        if self.in_one:
            return multiply_in_one(inner_grad, self._take_A(), self.ends)
        y = inner_grad.new_empty(len(inner_grad), self.A.shape[2])
        for expert, rows in self.groups.used:
            y[rows.slice] = inner_grad[rows.slice] @ self.A[expert].to(self.work)
        return y

    def differentiate_A(self, inner_grad: Tensor, x: Tensor) -> Tensor:
        """The sums over rows of ``h x^T``: ``[E * r, in]``."""
        dA = x.new_zeros(self.A.shape)
        if self.in_one:
            dA[self.ids] = multiply_in_one(inner_grad.t(), x, self.ends)
        else:
            for expert, rows in self.groups.used:
                torch.mm(inner_grad[rows.slice].t(), x[rows.slice], out=dA[expert])
        return dA.view(-1, x.shape[1])

    def differentiate_B(self, inner: Tensor, grad: Tensor) -> Tensor:
        """The sums over rows of ``g u^T``: ``[out, r * E]``."""
        dB = grad.new_zeros(self.B.shape)
        if self.in_one:
            dB[:, :, self.ids] = multiply_in_one(inner.t(), grad, self.ends).permute(2, 1, 0)
        else:
            for expert, rows in self.groups.used:
                # [r, out] first: a product of such a shape is faster on a CPU
                dB[:, :, expert] = (inner[rows.slice].t() @ grad[rows.slice]).t()
        return dB.view(self.out, -1)

    def _take_A(self) -> Tensor:
        return self.A[self.ids].to(self.work)

    def _take_B(self) -> Tensor:
        """``[used, out, r]``, contiguous."""
        return self.B[:, :, self.ids].to(self.work).permute(2, 0, 1).contiguous()

    def _take_one_B(self, expert: int) -> Tensor:
        return self.B[:, :, expert].to(self.work)
