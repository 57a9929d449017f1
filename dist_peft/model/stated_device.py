"""The device and the type that a model's code takes for its own.

``model.device`` and ``model.dtype`` of ``transformers`` are those of the first parameter. Code asks
for them to place inputs (Idefics 3: ``embeddings.to(self.device)``), and here the first parameter
may be any: one of a tower that no token comes to, which stays on ``meta``; one that rests on the
host; packed bytes; or a factor of an adapter in float32. So each model, and each model inside of
it, states both: the type that it was built in, and the engine's device once there is one.
"""

import functools
from collections.abc import Hashable
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel

__all__ = ["set_stated_device", "state_dtype"]


def state_dtype(model: nn.Module) -> None:
    """Let ``model`` and the models in it answer for ``dtype`` the type that they have now."""
    for module in _list_models(model):
        if any(parameter.is_floating_point() for parameter in module.parameters()):
            vars(module)["stated_dtype"] = module.dtype
            module.__class__ = _derive_stating_class(cast(Hashable, type(module)))


def set_stated_device(model: nn.Module, device: torch.device) -> None:
    """Let ``model`` and the models in it answer ``device`` for theirs."""
    for module in _list_models(model):
        vars(module)["stated_device"] = device


def _list_models(model: nn.Module) -> list[PreTrainedModel]:
    return [module for module in model.modules() if isinstance(module, PreTrainedModel)]


@functools.cache
def _derive_stating_class(kind: Hashable) -> type:
    """Return ``kind`` under its own name, one for all models of it, as they are compared by it."""
    assert isinstance(kind, type)
    own = {"device": property(_get_device), "dtype": property(_get_dtype)}
    own |= {"__module__": kind.__module__, "__qualname__": kind.__qualname__}  # type: ignore[dict-item]
    return type(kind.__name__, (kind,), own)


def _get_device(model: PreTrainedModel) -> torch.device:
    stated: torch.device | None = vars(model).get("stated_device")
    return next(p.device for p in model.parameters()) if stated is None else stated


def _get_dtype(model: PreTrainedModel) -> torch.dtype:
    stated: torch.dtype | None = vars(model).get("stated_dtype")
    if stated is None:  # built from the class of a model that has been given one
        return next(p.dtype for p in model.parameters() if p.is_floating_point())
    return stated
