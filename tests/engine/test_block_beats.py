"""Every block's forward and backward is progress."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from dist_peft.core.progress_beat import read_beat
from dist_peft.engine.activation_checkpointing import checkpoint_block_activations
from dist_peft.engine.block_beats import mark_block_progress


class Block(nn.Linear):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states)


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_forward_and_backward_of_each_block_are_marked(by_name: bool, recompute: bool) -> None:
    blocks = [Block(4, 4) for _ in range(3)]
    if recompute:
        checkpoint_block_activations(blocks)
    mark_block_progress(blocks)
    counts = [read_beat()[1]]
    hidden = torch.ones(2, 4, requires_grad=True)
    for block in blocks:
        hidden = block(hidden_states=hidden) if by_name else block(hidden)
        counts.append(read_beat()[1])
    hidden.sum().backward()
    counts.append(read_beat()[1])
    assert [b - a for a, b in itertools.pairwise(counts)] == [1, 1, 1, 3]


def test_nothing_is_kept_of_a_forward_without_gradients() -> None:
    block = Block(4, 4)
    mark_block_progress([block])
    hidden = torch.ones(2, 4, requires_grad=True)
    with torch.no_grad():
        block(hidden)
    assert not hidden._backward_hooks
