"""Tensors that ``transformers`` keeps in float32 while the rest of a model is in 16 bits.

A model class lists them as regular expressions, which ``from_pretrained`` searches for in full
names::

    _keep_in_fp32_modules_strict    float32 with float16 and bfloat16 (routers' correction biases)
    _keep_in_fp32_modules           float32 with float16 only (norms of gpt-oss, rwkv's decay)

A tensor that no pattern names has the type in which the class builds it: the default type, or one
that its code states (``torch.zeros(..., dtype=torch.float32)``). The model's own rounding is part
of the function: DeepSeek-V3 adds a correction bias to the scores of its experts, and bfloat16's
8 bits of it order the experts differently.

A written directory must compute the same function when it is loaded again, so the same
tensors are written in float32 (``find_wider_dtypes``). Persistent buffers are never written
narrower
than the base stores them: no adapter changes them, and runtimes other than ``transformers`` keep
some in float32 that ``transformers`` rounds when it loads them (MiniMax-M2's correction bias).
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from dist_peft.store.format import TensorSpec

__all__ = ["find_wider_dtypes", "is_kept_in_float32", "set_parameter_dtypes"]

_HALVES = (torch.float16, torch.bfloat16)


def is_kept_in_float32(model: nn.Module, name: str, *dtypes: torch.dtype) -> bool:
    """Return whether a parameter or buffer with this full name is float32 in a model of ``dtypes``.

    With several ``dtypes`` (of training, of a written file): float32 with any of them.
    """
    if not set(dtypes) & set(_HALVES):
        return False
    patterns = list(_list_float32_patterns(model, "_keep_in_fp32_modules_strict"))
    if torch.float16 in dtypes:
        patterns += _list_float32_patterns(model, "_keep_in_fp32_modules")
    return any(re.search(pattern.replace("*", ".*"), name) for pattern in patterns)


def _list_float32_patterns(model: Any, attribute: str) -> Iterable[str]:
    return getattr(model, attribute, None) or ()


def set_parameter_dtypes(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast parameters and persistent buffers of ``model`` to their types after
    ``from_pretrained(dtype)``.

    Args:
        model: built with default type ``dtype``; parameters may be on ``meta``.
    """
    persistent = model.state_dict().keys()
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dtype in _HALVES and is_kept_in_float32(model, prefix + name, dtype):
                wide = nn.Parameter(parameter.data.float(), parameter.requires_grad)
                module.register_parameter(name, wide)
        for name, buffer in module.named_buffers(recurse=False):
            full = prefix + name
            if (
                full in persistent
                and buffer.dtype in _HALVES
                and is_kept_in_float32(model, full, dtype)
            ):
                module._buffers[name] = buffer.float()


def find_wider_dtypes(
    model: nn.Module,
    names: Mapping[str, str],
    tensors: Mapping[str, TensorSpec],
    dtype: torch.dtype,
) -> dict[str, torch.dtype]:
    """Return tensors of the files that are written wider than the 16 bits asked for, and their
    type.

    Args:
        names: full name -> tensor in the files (``naming.TensorNames``).
        tensors: name -> spec in the files.
        dtype: the run's compute type.
    """
    # merged directories are 16 bits wide even where training was in float32
    narrow = dtype if dtype in _HALVES else torch.bfloat16
    found: dict[str, torch.dtype] = {}
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    for name, source in names.items():
        if name in buffers:
            wide = torch.promote_types(buffers[name].dtype, tensors[source].dtype)
        elif name in parameters and dtype in _HALVES and parameters[name].is_floating_point():
            wide = parameters[name].dtype
        else:
            wide = narrow
        if wide == torch.float32 or is_kept_in_float32(model, name, narrow):
            found[source] = torch.float32
    used = set(names.values())
    for name, spec in tensors.items():  # extra layers that this model does not have
        half = spec.dtype.is_floating_point and name not in used
        if half and is_kept_in_float32(model, name, narrow):
            found[name] = torch.float32
    return found
