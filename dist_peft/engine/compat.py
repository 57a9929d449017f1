"""Differences between torch 2.11 and 2.13 that engines meet.

Frozen uint8 parameters under FSDP2 on torch 2.11:

torch 2.12 taught FSDP2 about parameters that are not floating point (pytorch issue 177844). Before
that, ``FSDPParam`` first wraps every shard in ``nn.Parameter(shard)``, which refuses integers
because a parameter requires gradients by default, and its mixed-precision set-up would
cast them. This project never uses FSDP2's mixed precision, so only the wrapping needs fixing: in
that one module the name ``nn`` is replaced by a namespace whose ``Parameter`` asks for no gradient
on integers. On torch 2.12 and later nothing is touched.
"""

import types
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp._fully_shard import _fsdp_param

__all__ = ["all_gather", "allow_integer_parameters"]

# renamed in torch 2.13; the old name still works there but warns
all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
"""``all_gather_chunks(output, input, group=, async_op=)``: one tensor from each rank into one
tensor."""


def allow_integer_parameters() -> None:
    """Let ``fully_shard`` take uint8 parameters on torch before 2.12; idempotent."""
    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    if (major, minor) >= (2, 12) or not isinstance(_fsdp_param.nn, types.ModuleType):
        return
    if getattr(_fsdp_param.nn, "takes_integers", False):
        return

    def make_parameter(data: Tensor, requires_grad: bool = True) -> nn.Parameter:
        return nn.Parameter(data, requires_grad and data.is_floating_point())

    class Namespace(types.ModuleType):
        takes_integers = True
        Parameter = staticmethod(make_parameter)

        def __getattr__(self, name: str) -> Any:
            return getattr(nn, name)

    _fsdp_param.nn = Namespace("torch.nn for integer shards")
