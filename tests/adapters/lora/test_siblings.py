"""Linears that share the products of their input: which do, and the same numbers."""

import copy
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dist_peft.adapters.lora import layer as lora_layer
from dist_peft.adapters.lora import siblings
from dist_peft.adapters.lora.layer import LoraLinear, LoraSpec
from dist_peft.adapters.lora.siblings import link_siblings
from dist_peft.model.frozen_linear import FrozenLinear
from dist_peft.model.sample_dropout import DropoutPosition, SampleDropout
from dist_peft.quant.nf4 import Nf4Codec
from tests.support.torch_low_rank import use_torch_kernels

IN, CODEC = 32, Nf4Codec(16)
ROWS = {"q_proj": 32, "k_proj": 16, "v_proj": 16, "o_proj": 32, "gate_proj": 48, "up_proj": 48}


class Block(nn.Module):
    def __init__(self, p: float = 0.0, **settings: Any) -> None:
        super().__init__()
        generator, position = torch.Generator().manual_seed(0), DropoutPosition(0)
        position.begin_micro_batch(0, torch.arange(2))
        for name, rows in ROWS.items():
            base = FrozenLinear(IN, rows, CODEC, name == "k_proj", torch.bfloat16, "", "cpu")
            weight = torch.randn(rows, IN, generator=generator) / IN**0.5
            base.packed.data = CODEC.quantize_to_packed(weight)
            if base.bias is not None:
                base.bias.data = torch.randn(rows, generator=generator).bfloat16()
            spec = LoraSpec(**{**SPEC, **settings})
            adapted = LoraLinear(base, name, spec, SampleDropout(p, name, position), "cpu")
            for factor in (adapted.lora_A, adapted.lora_B):
                factor.data = torch.randn(factor.shape, generator=generator) / 4
            self.add_module(name, adapted)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        h = self.o_proj(torch.tanh(q + torch.cat([k, v], -1)))
        y: Tensor = self.gate_proj(h) * self.up_proj(h)
        return y


SPEC = {"r": 4, "scaling": 0.5, "arithmetic": torch.bfloat16, "seed": 0}


@pytest.fixture(autouse=True)
def fused() -> Iterator[None]:
    with use_torch_kernels():
        yield


def link(block: nn.Module) -> None:
    link_siblings({f"blocks.0.{name}": one for name, one in block.named_children()})


def run(block: nn.Module, recompute: bool = False) -> tuple[list[Any], int]:
    """Outputs and gradients, and the number of fused functions of one forward pass."""
    x = torch.randn(2, 5, IN, generator=torch.Generator().manual_seed(1)).bfloat16()
    x.requires_grad_()
    block.zero_grad()
    counted = [
        mock.patch.object(module, "apply_frozen_low_rank", wraps=module.apply_frozen_low_rank)
        for module in (lora_layer, siblings)
    ]
    with counted[0] as alone, counted[1] as together:
        y = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
        calls = alone.call_count + together.call_count
        y.float().square().sum().backward()
    return [y, x.grad, *(p.grad for p in block.parameters() if p.requires_grad)], calls


@pytest.mark.parametrize("recompute", [False, True])
def test_shared_products_are_those_of_each_alone(recompute: bool) -> None:
    block = Block()
    expected, calls = run(block)
    assert calls == 6
    link(block)
    found, calls = run(copy.deepcopy(block), recompute)
    assert calls == 3  # of q, k and v; of o; of gate and up
    for one, two in zip(expected, found, strict=True):
        assert (two - one).float().norm() <= 0.01 * one.float().norm()


@pytest.mark.parametrize(
    ("p", "settings", "calls"),
    [(0.2, {}, 6), (0.0, {"r": 43}, 4 + 1), (0.0, {"r": 65}, 6), (0.0, {"init": "lora_ga"}, 0)],
    ids=["dropout", "three ranks above 128", "two ranks above 128", "not fused"],
)
def test_who_stays_alone(p: float, settings: dict[str, Any], calls: int) -> None:
    block = Block(p, **settings)
    if calls == 0:
        link(block)
        assert not any(one.siblings for one in block.children())
        return
    link(block)
    assert run(block)[1] == calls
    if p:
        assert run(block.eval())[1] == 3


def test_linears_with_hooks_and_disabled_ones_stay_alone() -> None:
    block = Block()
    link(block)
    handle = block.v_proj.register_forward_pre_hook(lambda module, args: None)
    assert run(block)[1] == 6 - 1
    handle.remove()
    assert run(block)[1] == 3


def test_other_inputs_and_changed_ones_are_multiplied_alone() -> None:
    block = Block()
    x = torch.randn(1, 3, IN).bfloat16()
    with torch.no_grad():
        expected = [block.k_proj(2 * x), block.v_proj(-x), block.up_proj(x)]
        link(block)
        block.q_proj(x)
        assert torch.equal(block.k_proj(2 * x), expected[0])
        assert torch.equal(block.v_proj(x.neg_()), expected[1])
        assert torch.equal(block.up_proj(x.neg_()), expected[2])


def test_siblings_of_other_ranks_or_names_are_not_linked() -> None:
    block = Block()
    block.k_proj = Block(r=2).k_proj
    link(block)
    linked = [name for name, one in block.named_children() if one.siblings is not None]
    assert linked == ["gate_proj", "up_proj"]
    other = Block()
    link_siblings({"a.q_proj": other.q_proj, "b.k_proj": other.k_proj, "b.v_proj": other.v_proj})
    assert not any(one.siblings for one in other.children())
