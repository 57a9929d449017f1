"""The watch sees a gradient that is not finite, in its micro-batch, and leaves no hook behind."""

import math
from contextlib import closing

import pytest
import torch
from torch import Tensor, nn

from dist_peft.engine.activation_checkpointing import checkpoint_block_activations
from dist_peft.train.gradient_watch import GradientWatch


class Scale(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(value))

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (x * self.weight,)


class SquareRoot(nn.Module):
    """Its slope at 0 is infinite."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sqrt()


@pytest.mark.parametrize("recompute", [False, True])
def test_micro_batch_with_a_broken_gradient_is_found(recompute: bool) -> None:
    frozen = Scale(1.0).requires_grad_(False)  # its output has no gradient
    blocks: list[nn.Module] = [frozen, Scale(2.0), SquareRoot()]
    if recompute:
        checkpoint_block_activations(blocks)
    with closing(GradientWatch(blocks)) as watch:
        for _ in range(2):  # a step forgets the one before
            watch.begin_step()
            for value in (4.0, 0.0, 1.0):
                watch.begin_micro_batch()
                (hidden,) = blocks[0](torch.tensor([value]))
                (hidden,) = blocks[1](hidden)
                blocks[2](hidden).sum().backward()
            assert watch.list_not_finite() == [False, True, False]
    assert not any(block._forward_hooks for block in blocks)


def test_forward_passes_outside_of_a_step_are_left_alone() -> None:
    block = Scale(math.nan)
    with closing(GradientWatch([block])) as watch:
        block(torch.ones(1, requires_grad=True))[0].sum().backward()
        assert watch.list_not_finite() == []
