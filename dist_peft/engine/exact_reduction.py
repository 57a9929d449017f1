"""Integer sums for an engine that reduces gradients itself: DeepSpeed (``engine.zero``).

A hook on each trainable parameter takes the gradient of a micro-batch before DeepSpeed sees it and
leaves zeros, which DeepSpeed reduces in its own way. Before an update the step's sum of integers
(``engine.exact_gradients``), the same on every rank, is written over the reduced zeros.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_peft.engine.exact_gradients import (
    FixedPointGradients,
    GradientScale,
    compute_exact_norm,
)

__all__ = ["ExactReduction"]


class ExactReduction:
    """Sums of whole gradients over micro-batches and all ranks.

    Args:
        parameters: trainable ones, in an order that all ranks share.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], scale: GradientScale, device: torch.device
    ) -> None:
        self._scale = scale
        self._shapes = [_get_whole_shape(parameter) for parameter in parameters]
        sizes = [math.prod(shape) for shape in self._shapes]
        self._sums = FixedPointGradients(sizes, scale, device)
        self._pending: list[Tensor | None] = [None] * len(parameters)
        for number, parameter in enumerate(parameters):
            parameter.register_hook(self._make_hook(number))

    def _make_hook(self, number: int) -> Callable[[Tensor], Tensor]:
        def take_gradient(grad: Tensor) -> Tensor:
            if self._pending[number] is not None:  # used in several pieces of one backward pass
                self.end_micro_batch()
            self._pending[number] = grad.detach()
            return torch.zeros_like(grad)

        return take_gradient

    def end_micro_batch(self) -> None:
        """Add the gradients that hooks have taken."""
        self._sums.add_micro_batch(self._pending)
        self._pending = [None] * len(self._pending)

    def take_gradients(self, max_norm: float) -> tuple[float, list[Tensor | None]]:
        """Return the norm of the step's gradient and its parts, whole and clipped to ``max_norm``.

        The parts are NaN where the norm is. A collective; the next step begins.

        Raises:
            RunFailure: on every rank: a micro-batch exceeds the range of the sums.
        """
        flat = self._sums.take_sums(dist.all_reduce)
        known = [value for value in flat if value is not None]
        largest = torch.tensor(self._sums.range.take_largest(), dtype=torch.float64)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        norm = compute_exact_norm(known, float(largest), self._scale, None)
        if math.isnan(norm):
            for value in known:
                value.fill_(math.nan)
        elif 0 < max_norm < norm:
            torch._foreach_mul_(known, max_norm / norm)
        return norm, [
            None if value is None else value.view(shape)
            for value, shape in zip(flat, self._shapes, strict=True)
        ]


def _get_whole_shape(parameter: nn.Parameter) -> torch.Size:
    """Return the shape of a parameter, which ZeRO-3 keeps aside."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape
