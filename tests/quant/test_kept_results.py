"""Results of a first pass that a second one takes: order, misses, and what is dropped."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dist_peft.quant.kept_results import (
    KEPT_KINDS,
    keep_attention_results,
    keep_result,
    make_keeping_contexts,
)


class Counted:
    """A function that makes another tensor at each call."""

    def __init__(self, kind: str) -> None:
        self.kind, self.calls = kind, 0

    def __call__(self) -> Tensor:
        return keep_result(self.kind, self._compute)

    def _compute(self) -> Tensor:
        self.calls += 1
        return torch.full((2,), float(self.calls))


def test_recomputation_takes_results_in_order() -> None:
    product, inner, attention = Counted("product"), Counted("inner"), Counted("attention")
    calls: list[Callable[[], Tensor]] = [product, inner, product, attention, inner]
    first, second = make_keeping_contexts(KEPT_KINDS["products"])
    with first:
        made = [call() for call in calls]
    with second:
        taken = [call() for call in calls]
    assert all(torch.equal(a, b) for a, b in zip(made, taken, strict=True))
    assert (product.calls, inner.calls, attention.calls) == (2, 2, 1)
    assert not any(a is b for a, b in zip(made, taken, strict=True))
    with second:  # backward a second time: nothing is left
        assert product().tolist() == [3.0, 3.0]
    assert Counted("product")().tolist() == [1.0, 1.0]  # outside of a block


def test_kinds_that_are_not_kept_are_computed() -> None:
    product, inner = Counted("product"), Counted("inner")
    first, second = make_keeping_contexts(KEPT_KINDS["attention"])
    for context in (first, second):
        with context:
            product(), inner()
    assert (product.calls, inner.calls) == (2, 1)
    assert KEPT_KINDS["none"] == ()


def test_a_last_product_is_dropped() -> None:
    product, inner = Counted("product"), Counted("inner")
    first, second = make_keeping_contexts(KEPT_KINDS["products"])
    with first:
        product(), inner(), product()
    with second:
        product(), inner(), product()
    assert (product.calls, inner.calls) == (3, 1)


def test_a_result_that_was_changed_is_computed() -> None:
    product, inner = Counted("product"), Counted("inner")
    first, second = make_keeping_contexts(KEPT_KINDS["products"])
    with first:
        product().mul_(7)
        inner()
    with second:
        assert product().tolist() == [2.0, 2.0]
        assert inner().tolist() == [1.0, 1.0]


def test_blocks_within_blocks_have_lists_of_their_own() -> None:
    outer, inner = Counted("product"), Counted("product")
    pairs = [make_keeping_contexts(KEPT_KINDS["products"]) for _ in range(2)]
    for number in range(2):
        with pairs[0][number]:
            outer()
            with pairs[1][number]:
                inner(), Counted("inner")()
            outer(), Counted("inner")()
    assert (outer.calls, inner.calls) == (2, 1)


def test_attention_is_computed_once_and_its_gradients_are_the_same() -> None:
    q, k, v = (torch.randn(1, 2, 6, 8, requires_grad=True) for _ in range(3))
    attend = nn.functional.scaled_dot_product_attention
    expected = torch.autograd.grad(attend(q, k, v, is_causal=True).sum(), (q, k, v))
    first, second = make_keeping_contexts(KEPT_KINDS["attention"])
    with first, keep_attention_results(), torch.no_grad():
        y = attend(q, k, v, is_causal=True)
    with second, keep_attention_results():
        again = attend(q, k, v, is_causal=True)
        fresh = attend(q, k, 2 * v, is_causal=True)
    assert torch.equal(y, again) and again.requires_grad
    assert torch.equal(fresh, 2 * y)  # there was one result to take
    found = torch.autograd.grad(again.sum(), (q, k, v))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
