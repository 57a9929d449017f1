"""Decodes that recomputation leaves to backward: uses, what is freed, experts."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dist_peft.quant.frozen_matmul import frozen_matmul
from dist_peft.quant.grouped_matmul import RowGroups, frozen_grouped_matmul
from dist_peft.quant.nf4 import Nf4Codec
from dist_peft.quant.shared_decodes import (
    get_block_decodes,
    hold_decode,
    make_sharing_contexts,
    take_decode,
)
from dist_peft.quant.through_product import multiply_through

CODEC = Nf4Codec(16)


class Decode:
    """Makes another tensor at each call."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> Tensor:
        self.calls += 1
        return torch.full((2,), float(self.calls))


def test_a_weight_is_held_for_as_many_backwards_as_need_it() -> None:
    packed, decode = torch.zeros(1), Decode()
    first, second = make_sharing_contexts()
    with first:
        decodes = get_block_decodes()
        assert hold_decode(packed, "a", decode, True).tolist() == [1, 1]
    with second:
        assert get_block_decodes() is decodes is not None
        held = [hold_decode(packed, "a", decode, True) for _ in range(2)]
        hold_decode(packed, "a", decode, False)  # an input without a gradient
    assert held[0] is held[1] and decode.calls == 3
    taken = [take_decode(decodes, packed, "a", decode) for _ in range(2)]
    assert taken[0] is taken[1] is held[0] and decode.calls == 3
    assert not decodes._held
    for other in (packed.clone(), packed):  # of another tensor; no longer held
        take_decode(decodes, other, "a", decode)
    assert decode.calls == 5
    assert take_decode(None, packed, "a", decode).tolist() == [6, 6]


def test_one_block_holds_weights() -> None:
    """The recomputation of another block frees what a backward has not taken."""
    packed, decode = torch.zeros(1), Decode()
    found = []
    for _ in range(2):
        _, second = make_sharing_contexts()
        with second:
            hold_decode(packed, "a", decode, True)
            found.append(get_block_decodes())
    assert found[0] is not None and not found[0]._held
    assert found[1] is not None and len(found[1]._held) == 1
    assert get_block_decodes() is None


@pytest.mark.parametrize("kind", ["linear", "experts", "through the quantizer"])
def test_recomputation_and_backward_decode_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chain of one weight, twice; of three experts one has no rows."""
    grouped = kind == "experts"
    packed = CODEC.quantize_to_packed(torch.randn(48 if grouped else 16, 16) / 4)
    x = torch.randn(5, 16)
    decode, calls = Nf4Codec.dequantize_rows, []

    def count(*args: Any) -> Tensor:
        calls.append(1)
        return decode(*args)

    monkeypatch.setattr(Nf4Codec, "dequantize_rows", count)

    def multiply(x: Tensor) -> Tensor:
        if grouped:
            y = frozen_grouped_matmul(x, packed, CODEC, 16, RowGroups.from_counts((2, 0, 3)))
            groups = RowGroups.from_counts((1, 0, 4))
            return frozen_grouped_matmul(torch.tanh(y), packed, CODEC, 16, groups).sin()
        if kind == "linear":
            y = frozen_matmul(x, packed, CODEC, 16)
            return frozen_matmul(torch.tanh(y), packed, CODEC, 16).sin()
        A, B = torch.ones(2, 16), torch.ones(16, 2)
        options: Any = {"codec": CODEC, "scaling": 1.0, "dtype": torch.float32}
        y = multiply_through(x, packed, A, B, **options)
        return multiply_through(torch.tanh(y), packed, A, B, **options).sin()

    results = []
    for options in ({}, {"context_fn": make_sharing_contexts}):
        own = x.clone().requires_grad_()
        calls.clear()
        y = checkpoint(multiply, own, use_reentrant=False, **options)
        y.sum().backward(retain_graph=True)
        results.append((y, own.grad, len(calls)))
        again = torch.autograd.grad(y.sum(), own)[0]
        assert torch.equal(again, own.grad)  # type: ignore[arg-type]
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])  # type: ignore[arg-type]
    assert results[0][2] == 6
    # forward decodes for each of the two products, recomputation and backward once for all
    assert results[1][2] == 2 + 1


def test_an_error_in_a_block_leaves_no_active_decodes() -> None:
    def fail() -> Tensor:
        raise ZeroDivisionError

    first, second = make_sharing_contexts()
    for context in (first, second):
        with pytest.raises(ZeroDivisionError), context:
            hold_decode(torch.zeros(1), "a", fail, True)
        assert get_block_decodes() is None
