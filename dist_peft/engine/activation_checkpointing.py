"""Activation checkpointing: keep each block's input, compute the rest again in backward.

Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost". The block's ``forward`` is
wrapped, not the block: names and hooks (the engine's gather before, release after) stay where they
are, outside of the recomputed part. No random state is kept: the base computes without dropout and
the adapters' dropout is a function of the sample, not of a stream of random numbers.

More can be kept (``quant.kept_results``), decoded weights can stay from a block's recomputation to
its backward (``quant.shared_decodes``), and the inputs themselves can wait in host memory
(``engine.input_offload``). Either way the losses and gradients have the same bits.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dist_peft.core.config.engine import EngineConfig
from dist_peft.engine.input_offload import InputOffload, PinnedCopies, PlainCopies
from dist_peft.quant.assumed_device import get_assumed_device
from dist_peft.quant.kept_results import KEPT_KINDS, make_keeping_contexts
from dist_peft.quant.shared_decodes import make_sharing_contexts

__all__ = [
    "checkpoint_block_activations",
    "checkpoint_configured_blocks",
    "make_input_offload",
]

ContextFactory = Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]
"""Makes contexts of one call of a block: for its forward pass, and for its recomputation."""


def checkpoint_configured_blocks(
    blocks: Sequence[nn.Module],
    config: EngineConfig,
    device: torch.device,
    make_contexts: ContextFactory | None = None,
) -> None:
    """Wrap ``blocks``, which compute on ``device``, as section ``engine`` says.

    Args:
        make_contexts: further contexts of each call of a block.
    """
    if config.activation_checkpointing:
        offload, others = make_input_offload(config, device), config.share_decodes
        checkpoint_block_activations(blocks, config.keep_results, offload, others, make_contexts)


def checkpoint_block_activations(
    blocks: Sequence[nn.Module],
    keep_results: str = "none",
    offload: InputOffload | None = None,
    share_decodes: bool = False,
    make_contexts: ContextFactory | None = None,
) -> None:
    """Recompute each block's activations in backward.

    Args:
        keep_results: which results are not recomputed, a key of ``KEPT_KINDS``.
        offload: keeps the blocks' inputs elsewhere; None: they stay where they are.
        share_decodes: weights are decoded once for recomputation and backward.
        make_contexts: further contexts of each call.
    """
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    factories: list[ContextFactory] = []
    if kinds := KEPT_KINDS[keep_results]:
        factories.append(partial(make_keeping_contexts, kinds))
    if share_decodes:
        factories.append(make_sharing_contexts)
    if make_contexts is not None:
        factories.append(make_contexts)
    if factories:
        options["context_fn"] = partial(_join_contexts, factories)
    for block in blocks:
        recomputed = partial(checkpoint, block.forward, **options)
        block.forward = recomputed if offload is None else _hold_inputs(recomputed, offload)


class _JoinedContexts(AbstractContextManager[None]):
    """Contexts that are entered together, and may be entered again."""

    def __init__(self, contexts: Sequence[AbstractContextManager[Any]]) -> None:
        self._contexts = contexts

    def __enter__(self) -> None:
        for context in self._contexts:
            context.__enter__()

    def __exit__(self, *error: Any) -> None:
        for context in reversed(self._contexts):
            context.__exit__(*error)


def _join_contexts(factories: Sequence[ContextFactory]) -> tuple[_JoinedContexts, _JoinedContexts]:
    """Return contexts of one call of a block: for its forward pass, and for its recomputation."""
    pairs = [make() for make in factories]
    return _JoinedContexts([pair[0] for pair in pairs]), _JoinedContexts([p[1] for p in pairs])


def _hold_inputs(call: Any, offload: InputOffload) -> Any:
    """Return ``call`` with its first input held by ``offload``."""

    def call_block(*inputs: Any, **keywords: Any) -> Any:
        if not inputs or not torch.is_grad_enabled():  # a checkpoint saves no keywords
            return call(*inputs, **keywords)
        with offload.hold_inputs(inputs[0]):
            return call(*inputs, **keywords)

    return call_block


def make_input_offload(config: EngineConfig, device: torch.device) -> InputOffload | None:
    """Return the holder of inputs for ``engine.offload_inputs``; None without it, or on a CPU.

    Where a device is assumed (``quant.assumed_device``), copies stand for those of the device.
    """
    assumed = get_assumed_device()
    if not config.offload_inputs or (assumed or device).type != "cuda":
        return None
    return InputOffload(PinnedCopies(device) if assumed is None else PlainCopies())
