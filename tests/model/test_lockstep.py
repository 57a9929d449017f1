"""Callers in lockstep call each unit once, with the bits of their passes alone."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_peft.model.lockstep import Lockstep


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([nn.Linear(5, 5) for _ in range(3)])
        self.calls: list[tuple[int, int]] = []
        for number, block in enumerate(self.blocks):
            block.register_forward_pre_hook(partial(self.note_call, number))

    def note_call(self, number: int, block: nn.Module, inputs: Any) -> None:
        self.calls.append((number, len(inputs)))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return x


def compute_loss(model: nn.Module, x: Tensor) -> Tensor:
    loss: Tensor = model(x).square().sum()
    return loss


def test_units_are_called_once_and_passes_keep_their_bits() -> None:
    model = Stack()
    inputs = {k: torch.randn(k + 2, 5, requires_grad=True) for k in range(3)}
    alone = {k: torch.autograd.grad(compute_loss(model, x), x)[0] for k, x in inputs.items()}
    model.calls.clear()
    order: list[int] = []
    for number, block in enumerate(model.blocks):
        block.weight.register_hook(lambda grad, own=number: order.append(own))
    calls = {k: partial(compute_loss, model, x) for k, x in inputs.items()}
    losses = Lockstep(model, list(model.blocks)).run(calls)
    assert model.calls == [(0, 3), (1, 3), (2, 3)]
    for k, x in inputs.items():
        assert torch.equal(losses[k], compute_loss(model, x))
    torch.stack(list(losses.values())).sum().backward()
    assert order == [2, 1, 0]
    assert all(torch.equal(x.grad, alone[k]) for k, x in inputs.items())  # type: ignore[arg-type]
    assert all(block._compiled_call_impl is None for block in model.blocks)


def test_forwards_that_callers_replace_are_their_own() -> None:
    """As for losses in the head."""
    model = Stack()

    def call(factor: float) -> Tensor:
        head = model.blocks[-1]
        vars(head)["forward"] = lambda x: x * factor
        try:
            return compute_loss(model, torch.ones(2, 5))
        finally:
            del vars(head)["forward"]

    factors = {0: 2.0, 1: 3.0}
    wanted = {k: call(factor) for k, factor in factors.items()}
    calls = {k: partial(call, factor) for k, factor in factors.items()}
    assert Lockstep(model, list(model.blocks)).run(calls) == wanted
    assert "forward" not in vars(model.blocks[-1])


def test_error_of_a_caller_stops_the_others() -> None:
    model, ended = Stack(), []

    def call(size: int) -> Tensor:
        try:
            return compute_loss(model, torch.ones(2, size))
        except RuntimeError as error:
            ended.append(str(error))
            raise

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        Lockstep(model, list(model.blocks)).run({k: partial(call, k) for k in (5, 4)})
    assert len(ended) == 2 and ended[0] == ended[1]
    assert torch.isfinite(model(torch.ones(2, 5))).all()
