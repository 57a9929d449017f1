"""Inputs of blocks that leave and come back: order, lifetimes, and the bits of gradients."""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_peft.engine.activation_checkpointing import (
    checkpoint_block_activations,
    make_input_offload,
)
from dist_peft.engine.input_offload import InputOffload, PinnedCopies, PlainCopies
from tests.support.loaded_models import CPU

WIDTH = 16
BLOCKS = 4


class LateCopies(PlainCopies):
    """A stand-in for a device: a copy has its values only once somebody waits for it."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.on_device: list[weakref.ref[torch.UntypedStorage]] = []
        self.most = 0

    def copy_to_host(self, tensor: Tensor) -> tuple[Tensor, Any]:
        host = torch.full_like(tensor, torch.nan)
        self._note("out", tensor)
        return host, (tensor, host)

    def copy_to_device(self, host: Tensor) -> tuple[Tensor, Any]:
        tensor = torch.full_like(host, torch.nan)
        self._note("in", tensor)
        return tensor, (host, tensor)

    def wait(self, copying: Any) -> None:
        source, target = copying
        target.copy_(source)
        self.events.append("wait")

    def _note(self, event: str, tensor: Tensor) -> None:
        self.events.append(event)
        self.on_device = [one for one in self.on_device if one() is not None]
        self.on_device.append(weakref.ref(tensor.untyped_storage()))
        self.most = max(self.most, len(self.on_device))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return x + scale * torch.tanh(self.up(torch.tanh(x)))


def compute_gradients(offload: InputOffload | None, device: torch.device = CPU) -> list[Tensor]:
    torch.manual_seed(0)
    blocks = nn.ModuleList(Block() for _ in range(BLOCKS)).to(device)
    checkpoint_block_activations(list(blocks), "none", offload)
    x = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(1)).to(device)
    x.requires_grad_()
    for _ in range(2):  # micro-batches
        h: Any = x * 2
        for block in blocks:
            h = block(h, torch.full((WIDTH,), 0.5, device=device))
        h.sum().backward()
    return [parameter.grad for parameter in [x, *blocks.parameters()] if parameter.grad is not None]


@pytest.mark.parametrize("copies", [PlainCopies(), LateCopies()])
def test_gradients_have_the_same_bits(copies: PlainCopies) -> None:
    expected = compute_gradients(None)
    found = compute_gradients(InputOffload(copies))
    assert len(found) == 1 + 2 * BLOCKS
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_copies_are_under_way_while_a_block_computes() -> None:
    copies = LateCopies()
    compute_gradients(InputOffload(copies))
    forward = ["out", *["wait", "out"] * (BLOCKS - 1)]
    # the first one wanted is waited for at once; each brings the one before it along
    backward = ["wait", "in", "wait", "in", *["wait", "in"] * (BLOCKS - 2), "wait"]
    assert copies.events == [*forward, *backward] * 2
    assert copies.most <= 2


def test_nothing_stays_after_backward_or_a_lost_graph() -> None:
    offload, block = InputOffload(PlainCopies()), Block()
    checkpoint_block_activations([block], "none", offload)
    x, scale = torch.randn(8, WIDTH, requires_grad=True), torch.ones(WIDTH)
    y = block(x * 1, scale)
    assert offload._last() is not None
    del y
    gc.collect()
    assert offload._last() is None
    with torch.no_grad():
        block(x, scale)
    assert offload._last() is None
    assert torch.equal(block(x=x, scale=scale), block(x, scale))  # keywords are not offloaded


def test_is_of_cuda_alone() -> None:
    from dist_peft.core.config.engine import EngineConfig
    from dist_peft.quant.assumed_device import assume_device

    wanted = EngineConfig(offload_inputs=True)
    assert make_input_offload(wanted, CPU) is None
    with assume_device(torch.device("cuda")):
        assert make_input_offload(wanted, CPU) is not None
        assert make_input_offload(EngineConfig(), CPU) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_pinned_copies_give_the_same_bits() -> None:
    device = torch.device("cuda", 0)
    expected = compute_gradients(None, device)
    found = compute_gradients(InputOffload(PinnedCopies(device)), device)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    host, copying = PinnedCopies(device).copy_to_host(torch.ones(4, device=device))
    assert host.is_pinned() and copying is not None
