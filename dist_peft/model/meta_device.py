"""Modules built without memory: on the ``meta`` device."""

import math
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

__all__ = ["EmptyOnMeta"]

_DRAWS = ("normal_", "uniform_", "kaiming_uniform_")
"""By name: of ``Tensor``, of ``torch.nn.init``, and those that ``transformers`` puts there."""


class EmptyOnMeta(TorchFunctionMode):
    """Redirects allocations of uninitialized memory to ``meta``; everything else runs as is.

    Large stacks of zeros are weights, too: Llama 4 makes its experts' so.

    Random initialization of a ``meta`` tensor is skipped: it has no values, and to find out that
    there is nothing to draw takes PyTorch a millisecond for each weight.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        if func is torch.zeros and kwargs.get("device") is None and _is_stack(args):
            kwargs["device"] = "meta"
        if getattr(func, "__name__", None) in _DRAWS:
            tensor = args[0] if args else kwargs["tensor"]
            if tensor.is_meta:
                return tensor
        return func(*args, **kwargs)


def _is_stack(shape: tuple[Any, ...]) -> bool:
    """Whether the arguments of ``torch.zeros`` are three sizes of 2^20 numbers or more."""
    sizes = shape[0] if len(shape) == 1 and isinstance(shape[0], tuple | list) else shape
    return len(sizes) == 3 and math.prod(sizes) >= 2**20
