"""Activation checkpointing: keep each block's input, compute the rest again in backward.

Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost". The block's ``forward`` is
wrapped, not the block: names and hooks (the engine's gather before, release after) stay where they
are, outside of the recomputed part. No random state is kept: the base computes without dropout and
the adapters' dropout is a function of the sample, not of a stream of random numbers.
"""

from collections.abc import Sequence
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

__all__ = ["checkpoint_block_activations"]


def checkpoint_block_activations(blocks: Sequence[nn.Module]) -> None:
    """Recompute each block's activations in backward."""
    for block in blocks:
        block.forward = partial(
            checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
        )
