"""Notice, micro-batch by micro-batch, whether this rank's gradient is finite.

Gradients of all micro-batches and ranks are summed before anybody looks at them: one that is not
finite has lost its origin by then. Backward passes ``NaN`` and ``inf`` on, so one look at the
gradient of the first block's output that has one (``[B, S, H]``, the last that backward computes)
sees the error of any later block.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["GradientWatch"]


class GradientWatch:
    """Hooks on the outputs of decoder blocks; ``close`` removes them.

    Args:
        blocks: decoder blocks, first to last.
    """

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        self._handles = [block.register_forward_hook(self._watch_output) for block in blocks]
        self._flags: list[Tensor | None] = []
        self._is_watching = True

    def begin_step(self) -> None:
        """Forget the micro-batches of the step before."""
        self._flags.clear()

    def begin_micro_batch(self) -> None:
        """Announce the forward pass of the next micro-batch of the step."""
        self._flags.append(None)
        self._is_watching = False

    def list_not_finite(self) -> list[bool]:
        """Return whether a gradient that is not finite was seen, by micro-batch of the step."""
        return [flag is not None and bool(flag) for flag in self._flags]

    def _watch_output(self, block: nn.Module, inputs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if self._is_watching or not self._flags:
            return
        if isinstance(hidden, Tensor) and hidden.requires_grad:
            self._is_watching = True  # once a micro-batch, also where blocks are recomputed
            hidden.register_hook(self._note_gradient)

    def _note_gradient(self, grad: Tensor) -> None:
        self._flags[-1] = ~torch.isfinite(grad).all()  # read only if the step fails: no wait here

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
