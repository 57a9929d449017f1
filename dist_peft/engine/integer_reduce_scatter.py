"""FSDP2's reduction of gradients, over integers (``engine.exact_gradients``).

FSDP2 calls a unit's reduce-scatter with the unit's gradients of one micro-batch, float32, in the
layout of its shards, and adds the result to the shards' ``grad``. Here that result is zero but for
the last micro-batch of a step, whose result is the step's sum::

    micro-batch      1      2      3 (last)
    integers        +i     +i     +i  -> reduce-scatter (each time, or once a step)
    given to FSDP2   0      0     float32(I u)

so that no float is added to another.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter

from dist_peft.engine.compat import reduce_scatter
from dist_peft.engine.exact_gradients import GradientRange, GradientScale

__all__ = ["IntegerReduceScatter"]


class IntegerReduceScatter(ReduceScatter):
    """The reduce-scatter of one FSDP2 unit.

    Args:
        found: of all units; looks at every gradient before it is converted.
        is_kept_whole: ranks sum whole gradients of their own and exchange them once a step, instead
            of their shares after each micro-batch.

    Attributes:
        is_last: whether the next backward is the last of its step.
    """

    def __init__(self, scale: GradientScale, found: GradientRange, is_kept_whole: bool) -> None:
        self._scale, self._range = scale, found
        self._is_kept_whole = is_kept_whole
        self._total: Tensor | None = None
        self.is_last = True

    def allocate(
        self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: object,
        async_op: bool = False,
    ) -> None:
        """Add the micro-batch in ``input_tensor`` [ranks x n]; ``output_tensor`` [n] is 0 or the
        step's sum."""
        self._range.note_values(input_tensor)
        if self._is_kept_whole:
            total = self._add(input_tensor.shape, input_tensor)
            if self.is_last:
                total = _scatter_sum(total, len(output_tensor), group)
        else:
            own = torch.zeros(input_tensor.shape, dtype=torch.int64, device=input_tensor.device)
            self._scale.add_values(own, input_tensor)
            total = self._add(output_tensor.shape, _scatter_sum(own, len(output_tensor), group))
        if not self.is_last:
            output_tensor.zero_()
            return
        output_tensor.copy_(self._scale.read_values(total))
        self._total = None

    def _add(self, shape: torch.Size, values: Tensor) -> Tensor:
        """Add floats or integers to the step's sum and return it."""
        if self._total is None:
            self._total = torch.zeros(shape, dtype=torch.int64, device=values.device)
        assert self._total.shape == shape, "a unit has gradients of the same parameters in a step"
        if values.dtype == torch.int64:
            self._total += values
        else:
            self._scale.add_values(self._total, values)
        return self._total


def _scatter_sum(total: Tensor, size: int, group: dist.ProcessGroup) -> Tensor:
    """Return this rank's part [size] of the sum over ranks of an int64 tensor [ranks x size]."""
    part = torch.empty(size, dtype=torch.int64, device=total.device)
    reduce_scatter(part, total, group=group)
    return part
