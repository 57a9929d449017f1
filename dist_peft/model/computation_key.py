"""A key of what a model computes, to reuse the outcome of trying it."""

import json

from transformers import PreTrainedModel

from dist_peft.model.block_kinds import block_kind
from dist_peft.model.frozen_linear import FrozenWeight

__all__ = ["describe_computation"]


def describe_computation(model: PreTrainedModel) -> object:
    """Return a key equal for models that compute alike: config, code, modules, shapes.

    How weights are packed is no part of it: the probe asks for the shape of a product only.
    """
    return (
        json.dumps({**model.config.to_dict(), "_name_or_path": ""}, sort_keys=True, default=str),
        model.config._attn_implementation,
        tuple(
            (
                getattr(type(module), "forward", None),
                getattr(vars(module).get("forward"), "__code__", None),
                vars(module).get("in_features"),
                vars(module).get("out_features"),
                tuple((n, b.shape, b.dtype) for n, b in module._buffers.items() if b is not None),
            )
            for module in model.modules()
        ),
        tuple(
            (name, kind, tuple(p for p in shapes if not _is_packed(kind, p[0])), settings)
            for name, kind, shapes, settings in block_kind(model)
        ),
    )


def _is_packed(kind: type, name: str) -> bool:
    return name == "packed" and issubclass(kind, FrozenWeight)
