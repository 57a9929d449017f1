"""Beats of the blocks of a model: each block's forward and backward is progress.

So a step may take as long as it does, on CPUs minutes: the time of one block is limited.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dist_peft.core.progress_beat import mark_progress

__all__ = ["mark_block_progress"]


def mark_block_progress(blocks: Sequence[nn.Module]) -> None:
    """Mark progress at the begin of each block's forward, and at the end of its backward."""
    for block in blocks:
        block.register_forward_pre_hook(_mark_forward, with_kwargs=True)


def _mark_forward(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    mark_progress()
    hidden = args[0] if args else kwargs.get("hidden_states")
    if torch.is_grad_enabled() and isinstance(hidden, Tensor) and hidden.requires_grad:
        hidden.register_hook(_mark_backward)


def _mark_backward(gradient: Tensor) -> None:
    mark_progress()
