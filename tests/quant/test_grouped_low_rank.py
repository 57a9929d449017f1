"""Low-rank changes of sorted rows, each with its expert's factors, against one expert at a time."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from dist_peft.quant import grouped_low_rank
from dist_peft.quant.grouped_low_rank import apply_grouped_low_rank
from dist_peft.quant.grouped_matmul import RowGroups
from dist_peft.quant.trainable_products import apply_low_rank

E, R, IN, OUT, S = 5, 8, 32, 24, 0.5
GROUPS = RowGroups.from_counts([3, 0, 4, 0, 9])


def one_by_one(
    x: Tensor, A: Tensor, B: Tensor, groups: RowGroups, scaling: float, dtype: torch.dtype
) -> Tensor:
    """The product of each expert by ``apply_low_rank``."""
    factors = zip(A.view(E, R, -1).unbind(0), B.view(-1, R, E).unbind(2), strict=True)
    parts = zip(x.split(list(groups.counts)), factors, strict=True)
    return torch.cat([apply_low_rank(own, a, b, scaling, dtype) for own, (a, b) in parts])


def differentiate(multiply: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The change, and the gradients of rows and factors."""
    generator = torch.Generator().manual_seed(1)
    shapes = ((GROUPS.num_rows, IN), (E * R, IN), (OUT, R * E), (GROUPS.num_rows, OUT))
    x, A, B, upstream = (torch.randn(shape, generator=generator) for shape in shapes)
    leaves = [x.to(dtype).requires_grad_(), A.requires_grad_(), B.requires_grad_()]
    y = multiply(*leaves, GROUPS, S, dtype)
    y.backward(upstream.to(y.dtype))
    return [y.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_products_of_each_expert(
    dtype: torch.dtype, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bits on a CPU, whichever way it computes 16-bit numbers, in one autograd node."""

    def has_fast_product(device: Any, dtype: torch.dtype) -> bool:
        return native or dtype.itemsize != 2

    for module in ("grouped_low_rank", "trainable_products"):
        monkeypatch.setattr(f"dist_peft.quant.{module}.has_fast_product", has_fast_product)
    mine, theirs = (differentiate(m, dtype) for m in (apply_grouped_low_rank, one_by_one))
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True)) and len(mine) == 4
    assert not mine[2].view(E, R, IN)[[1, 3]].any() and mine[2].view(E, R, IN)[4].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_six_calls_for_all_experts(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's grouped product, here on a CPU: to rounding, two calls forward, four backward."""
    wanted = differentiate(one_by_one, dtype)
    calls: list[tuple[int, ...]] = []
    own = functional.grouped_mm

    def count_call(x: Tensor, weights: Tensor, offs: Tensor) -> Tensor:
        calls.append(tuple(weights.shape))
        result: Tensor = own(x, weights, offs=offs)
        return result

    monkeypatch.setattr(grouped_low_rank, "can_group_products", lambda *operands: True)
    monkeypatch.setattr(functional, "grouped_mm", count_call)
    found = differentiate(apply_grouped_low_rank, dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for got, value in zip(found, wanted, strict=True):
        largest = float(value.abs().max())
        torch.testing.assert_close(got, value, rtol=tolerance, atol=tolerance * largest)
    rows = GROUPS.num_rows
    forward = [(3, IN, R), (3, R, OUT)]
    assert calls == [*forward, (rows, OUT), (3, OUT, R), (rows, IN), (3, R, IN)]


def test_without_rows_all_gradients_are_zeros() -> None:
    """Every rank has gradients of the same parameters, with or without tokens."""
    A, B = torch.randn(E * R, IN).requires_grad_(), torch.randn(OUT, R * E).requires_grad_()
    none = RowGroups.from_counts([0] * E)
    y = apply_grouped_low_rank(torch.zeros(0, IN), A, B, none, S, torch.float32)
    assert y.shape == (0, OUT) and y.requires_grad
    y.sum().backward()
    assert A.grad is not None and not A.grad.any() and B.grad is not None and not B.grad.any()


def test_wrong_shapes_are_refused() -> None:
    A, B, x = torch.zeros(E * R, IN), torch.zeros(OUT, R * E), torch.zeros(16, IN)
    with pytest.raises(ValueError, match="no factors of 5 experts"):
        apply_grouped_low_rank(x, A[1:], B, GROUPS, S, torch.float32)
    with pytest.raises(ValueError, match=r"x is \[16, 32\]"):
        apply_grouped_low_rank(x[1:], A, B, GROUPS, S, torch.float32)
