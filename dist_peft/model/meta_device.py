"""Modules built without memory: on the ``meta`` device."""

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

__all__ = ["EmptyOnMeta"]

_DRAWS = ("normal_", "uniform_", "kaiming_uniform_")
"""By name: of ``Tensor``, of ``torch.nn.init``, and those that ``transformers`` puts there."""


class EmptyOnMeta(TorchFunctionMode):
    """Redirects allocations of uninitialized memory to ``meta``; everything else runs as is.

    Random initialization of a ``meta`` tensor is skipped: it has no values, and to find out that
    there is nothing to draw takes PyTorch a millisecond for each weight.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        if getattr(func, "__name__", None) in _DRAWS:
            tensor = args[0] if args else kwargs["tensor"]
            if tensor.is_meta:
                return tensor
        return func(*args, **kwargs)
