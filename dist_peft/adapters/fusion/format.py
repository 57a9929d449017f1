"""A fusion on disk, in the format of the library ``adapters`` (AdapterHub), 1.3.

::

    adapter_fusion_config.json       {"config": {AdapterFusionConfig}, "name", "adapter_names", ...}
    model_adapter_fusion.safetensors PLACE.adapter_fusion_layer.NAME.query.weight [d, d], .bias [d],
                                     .key.weight [d, d], .key.bias [d], .value.weight [d, d]
    RTE/, MRPC/                      the fused adapters, each as in ``adapters.bottleneck.format``

``PLACE`` is that of the adapters, ``NAME`` of the fusion is those of its adapters, joined by
commas. The library reads it with ``load_adapter(DIR/RTE)``, ``load_adapter(DIR/MRPC)``, ...,
``load_adapter_fusion(DIR)``. Its own directories have the adapters elsewhere.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Never

import torch
from torch import Tensor

from dist_peft.adapters.bottleneck.format import (
    VERSION,
    ModelDescription,
    parse_bottleneck_tensors,
    refuse_nonlinear_merge,
    to_adapterhub_path,
    to_model_path,
)
from dist_peft.adapters.protocol import PublicAdapter
from dist_peft.core.errors import UserError

__all__ = [
    "CONFIG",
    "TENSORS",
    "FusionFormat",
    "is_fusion_config",
    "list_fused_names",
    "parse_fusion_tensors",
    "to_public_fusion",
]

CONFIG = "adapter_fusion_config.json"
TENSORS = "model_adapter_fusion.safetensors"

_OWN_NAMES = {
    "query_weight": "query.weight",
    "query_bias": "query.bias",
    "key_weight": "key.weight",
    "key_bias": "key.bias",
    "value_change": "value.weight",
}
_DYNAMIC: dict[str, Any] = {
    "key": True,
    "query": True,
    "query_before_ln": False,
    "residual_before": False,
    "temperature": False,
    "value": True,
    "value_before_softmax": True,
    "value_initialized": True,
}
"""The preset ``dynamic``, but for ``regularization`` and ``dropout_prob``."""

_NO_MATTER = {"regularization", "dropout_prob", "value_before_softmax", "value_initialized"}
"""Keys without influence on the output of a trained fusion."""


def to_public_fusion(
    names: Sequence[str],
    described: ModelDescription,
    layers: Mapping[str, Mapping[str, Tensor]],
    parts: Mapping[str, PublicAdapter],
    *,
    regularized: bool,
    dropout: float,
) -> PublicAdapter:
    """Trained parameters -> public form.

    Args:
        names: of the adapters, in their order.
        described: the base.
        layers: path of each fusion -> own name (as in ``adapters.fusion``) -> whole tensor.
        parts: the adapters by name.
        regularized: whether there was a penalty.
        dropout: of the scores.
    """
    fusion = ",".join(names)
    about = {
        "adapter_names": list(names),
        "config": {**_DYNAMIC, "regularization": regularized, "dropout_prob": dropout or None},
        "hidden_size": described.hidden,
        "model_class": described.model_class,
        "model_name": described.base,
        "model_type": described.model_type,
        "name": fusion,
        "version": VERSION,
    }
    tensors = {
        f"{to_adapterhub_path(path)}.adapter_fusion_layer.{fusion}.{_OWN_NAMES[name]}": _absolute(
            name, value
        )
        for path, own in layers.items()
        for name, value in own.items()
    }
    return PublicAdapter(about, tensors, parts=dict(parts))


def _absolute(name: str, value: Tensor) -> Tensor:
    return value + torch.eye(len(value)) if name == "value_change" else value.contiguous()


def is_fusion_config(config: Mapping[str, Any]) -> bool:
    """Whether this configuration of AdapterHub's library is a fusion's."""
    own = config.get("config")
    return isinstance(own, dict) and "query_before_ln" in own


def list_fused_names(config: Mapping[str, Any]) -> list[str]:
    """Names of the fused adapters, in their order."""
    names = config.get("adapter_names") or config["name"]
    return names.split(",") if isinstance(names, str) else list(names)


def parse_fusion_tensors(public: PublicAdapter) -> dict[str, dict[str, Tensor]]:
    """Path of each fusion -> own name -> tensor, checked.

    Raises:
        UserError: a fusion that computes something else; a tensor is empty, absent, of the wrong
            shape or none of a fusion's.
    """
    for key, value in public.config["config"].items():
        if key not in _NO_MATTER and value != _DYNAMIC.get(key):
            raise UserError(
                f"adapter_fusion_config.json: {key} is {value!r}, not {_DYNAMIC.get(key)!r}; of "
                "AdapterHub's fusions only those equal to its preset dynamic are read"
            )
    d, fusion = int(public.config["hidden_size"]), str(public.config["name"])
    own = {value: key for key, value in _OWN_NAMES.items()}
    layers: dict[str, dict[str, Tensor]] = {}
    for key, value in public.tensors.items():
        found = re.fullmatch(rf"(.*)\.adapter_fusion_layer\.{re.escape(fusion)}\.(.*)", key)
        if found is None or found[2] not in own:
            raise UserError(f"tensor {key} is none of the fusion {fusion}'s")
        name = own[found[2]]
        shape = [d] if name.endswith("bias") else [d, d]
        if list(value.shape) != shape:
            raise UserError(f"fusion tensor {key} has shape {list(value.shape)}, not {shape}")
        change = value - torch.eye(d, dtype=value.dtype) if name == "value_change" else value
        layers.setdefault(to_model_path(found[1]), {})[name] = change
    if not layers:
        raise UserError("the fusion has no tensors: it was saved without its data")
    for path, tensors in layers.items():
        if absent := _OWN_NAMES.keys() - tensors.keys():
            raise UserError(f"the fusion has no {sorted(absent)[0]} of {path}: it is damaged")
    return layers


class FusionFormat:
    """AdapterFusion in AdapterHub's files; each fused adapter has a directory of its own."""

    peft_types = ()
    config_file = CONFIG
    tensors_file = TENSORS
    pickle_file = "pytorch_model_adapter_fusion.bin"
    safe_saving = "adapters: save_adapter_fusion(..., use_safetensors=True)"
    joins_head = False
    on_gptq_linears = False
    on_bnb_linears = False

    def matches(self, config: Mapping[str, Any]) -> bool:
        """Return whether the configuration is a fusion's."""
        return "peft_type" not in config and is_fusion_config(config)

    def check(self, public: PublicAdapter) -> None:
        """Check the tensors of the fusion and of its adapters against their configurations.

        Raises:
            UserError: ``parse_fusion_tensors`` refuses them, or a fused adapter is damaged.
        """
        parse_fusion_tensors(public)
        for part in public.parts.values():
            parse_bottleneck_tensors(part)

    def describe(self, config: Mapping[str, Any]) -> str:
        """Return the names of the fused adapters."""
        return f"fusion of {', '.join(list_fused_names(config))}"

    def explain_no_peft_form(self, config: Mapping[str, Any]) -> str:
        """Return that PEFT lacks the method."""
        return "trained adapter.kind fusion, which PEFT does not have"

    def open_merger(self, public: PublicAdapter, *, tied: bool) -> Never:
        """Refuse the merge: no weight can hold a nonlinearity.

        Raises:
            UserError: always.
        """
        refuse_nonlinear_merge("a fusion of bottlenecks")
