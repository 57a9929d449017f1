"""Products with trainable weights, in both ways of computing 16-bit numbers, against float64."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from dist_peft.quant import trainable_products
from dist_peft.quant.trainable_products import apply_linear, apply_low_rank, multiply_batched

BF16 = torch.bfloat16
S = 0.5


def low_rank(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    return apply_low_rank(x, A, B, S, x.dtype)


def exact_low_rank(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    return functional.linear(functional.linear(x, A) * S, B)


Product = Callable[..., Tensor]
# product, its formula, shapes, which arguments are activations (in the 16-bit type)
PRODUCTS: dict[str, tuple[Product, Product, list[tuple[int, ...]], int]] = {
    "low rank": (low_rank, exact_low_rank, [(2, 7, 40), (5, 40), (24, 5)], 1),
    "linear": (apply_linear, functional.linear, [(2, 7, 40), (24, 40), (24,)], 1),
    "linear without bias": (apply_linear, functional.linear, [(11, 40), (24, 40)], 1),
    "batched": (multiply_batched, torch.matmul, [(2, 7, 1, 40), (2, 7, 40, 3)], 2),
}


@pytest.fixture(params=[True, False], ids=["native", "float32"])
def is_native(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    native: bool = request.param
    monkeypatch.setattr(
        trainable_products, "has_fast_product", lambda _, dtype: native or dtype.itemsize != 2
    )
    return native


def make_inputs(shapes: Sequence[tuple[int, ...]], activations: int, dtype: torch.dtype) -> list:  # type: ignore[type-arg]
    generator = torch.Generator().manual_seed(3)
    made = [torch.randn(shape, generator=generator) for shape in shapes]
    return [x.to(dtype if i < activations else x.dtype) for i, x in enumerate(made)]


def differentiate(product: Product, inputs: Sequence[Tensor], upstream: Tensor) -> list[Tensor]:
    """Return the product and the gradients of its inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    y = product(*leaves)
    y.backward(upstream.to(y.dtype))
    return [y.detach(), *(x.grad for x in leaves if x.grad is not None)]


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", PRODUCTS)
def test_values_and_gradients(name: str, dtype: torch.dtype, is_native: bool) -> None:
    product, formula, shapes, activations = PRODUCTS[name]
    inputs = make_inputs(shapes, activations, dtype)
    exact = [x.double() for x in inputs]
    upstream = torch.randn_like(formula(*exact)).to(dtype)
    expected = differentiate(formula, exact, upstream.double())
    found = differentiate(product, inputs, upstream)
    assert [x.dtype for x in found] == [dtype, *(x.dtype for x in inputs)]
    for own, right in zip(found, expected, strict=True):
        error, step = (own.double() - right).abs(), torch.finfo(dtype).eps
        if is_native or dtype == torch.float32:  # weights and each product are rounded
            assert error.max() <= 8 * step * right.abs().max()
        elif own.dtype == dtype:  # one rounding at the end
            assert (error <= 0.51 * step * right.abs() + 1e-5).all()
        else:  # weights' gradients are not rounded
            assert error.max() <= 1e-5 * right.abs().max()


@pytest.mark.parametrize("name", ["low rank", "linear"])
def test_computes_only_the_gradients_that_are_due(name: str, is_native: bool) -> None:
    product, _, shapes, activations = PRODUCTS[name]
    x, *weights = make_inputs(shapes, activations, BF16)
    upstream = torch.ones_like(product(x, *weights))
    whole = differentiate(product, [x, *weights], upstream)
    for due in range(len(weights) + 1):
        leaves = [t.detach().requires_grad_(i == due) for i, t in enumerate([x, *weights])]
        product(*leaves).backward(upstream)
        assert [t.grad is not None for t in leaves] == [i == due for i in range(len(leaves))]
        assert torch.equal(leaves[due].grad, whole[1 + due])


def test_factors_may_be_freed_between_forward_and_backward(is_native: bool) -> None:
    """As FSDP2 does; the refilled storage is used, and recomputation changes nothing."""
    x, A, B = make_inputs(PRODUCTS["low rank"][2], 1, BF16)
    upstream = torch.ones(2, 7, 24, dtype=BF16)
    expected = differentiate(low_rank, [x, A, B], upstream)
    leaves = [t.clone().requires_grad_() for t in (x, A, B)]
    y = checkpoint(low_rank, *leaves, use_reentrant=False)
    y.backward(upstream)
    for leaf, right in zip(leaves, expected[1:], strict=True):
        assert torch.equal(leaf.grad, right)
    x, A, B = leaves = [t.detach().clone().requires_grad_() for t in leaves]
    y = low_rank(x, A, B)
    kept = [t.detach().clone() for t in (A, B)]
    sizes = [t.untyped_storage().nbytes() for t in (A, B)]
    for t in (A, B):
        t.untyped_storage().resize_(0)
    with torch.no_grad():
        for t, size, values in zip((A, B), sizes, kept, strict=True):
            t.untyped_storage().resize_(size)
            torch.autograd._unsafe_preserve_version_counter(t)
            t.data.copy_(values)
    y.backward(upstream)
    for leaf, right in zip(leaves, expected[1:], strict=True):
        assert torch.equal(leaf.grad, right)
