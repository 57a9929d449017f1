"""Recomputation changes what is kept, and nothing else."""

from typing import Any

import torch
from torch import Tensor, nn

from dist_peft.engine.activation_checkpointing import checkpoint_block_activations

WIDTH, ROWS = 16, 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)
        self.calls = 0

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        self.calls += 1
        return x + scale * self.down(torch.tanh(self.up(x)))


def model() -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(Block() for _ in range(3))


def run(blocks: nn.ModuleList) -> tuple[dict[str, Tensor], int]:
    """Gradients by name, and the bytes of activations that autograd keeps for backward."""
    own = {p.untyped_storage().data_ptr() for p in blocks.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    x = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1), requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        h: Any = x
        for block in blocks:
            h = block(h, scale=0.5)
        loss = h.sum()
    held = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    loss.backward()
    assert x.grad is not None
    gradients = {name: p.grad for name, p in blocks.named_parameters() if p.grad is not None}
    return {"x": x.grad, **gradients}, held


def test_gradients_are_equal_and_less_is_kept() -> None:
    plain, recomputing = model(), model()
    checkpoint_block_activations(list(recomputing))
    expected, kept = run(plain)
    found, kept_less = run(recomputing)
    assert found.keys() == expected.keys() and len(found) == 13
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert kept >= 3 * ROWS * (WIDTH + 64) * 4  # each block's input and its tanh
    assert kept_less <= 3 * ROWS * WIDTH * 4  # each block's input
    assert [block.calls for block in plain] == [1, 1, 1]
    assert [block.calls for block in recomputing] == [2, 2, 2]


def test_names_and_hooks_stay() -> None:
    """Hooks are outside of what is recomputed: they run once a forward."""
    blocks = model()
    names = [name for name, _ in blocks.named_parameters()]
    seen: list[str] = []
    blocks[0].register_forward_pre_hook(lambda module, args: seen.append("before"))
    checkpoint_block_activations(list(blocks))
    blocks[0].register_forward_hook(lambda module, args, output: seen.append("after"))
    run(blocks)
    assert seen == ["before", "after"]
    assert [name for name, _ in blocks.named_parameters()] == names
