"""Trained routers on disk, as PEFT stores whole modules next to an adapter::

    adapter_config.json          modules_to_save: [mlp.gate]
    adapter_model.safetensors    base_model.model.model.layers.0.mlp.gate.weight [experts, hidden]

Other modules that PEFT can save whole (embeddings, heads of language models) are not read.
"""

import re
from typing import Any

from torch import Tensor

from dist_peft.adapters.protocol import PublicAdapter, PublicHead

__all__ = ["join_peft_routers", "split_peft_routers"]

_PREFIX = "base_model.model."
_ROUTER = re.compile(r".*\.(gate|router)\.(weight|bias)")


def join_peft_routers(public: PublicAdapter) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and tensors of PEFT's files, with the routers in ``public.head``."""
    assert public.head is not None
    # with the parent's name: PEFT compares endings, and a shared expert has a gate too
    modules = {".".join(name.split(".")[-3:-1]) for name in public.head.tensors}
    mine = {f"{_PREFIX}{name}": value for name, value in public.head.tensors.items()}
    return {**public.config, "modules_to_save": sorted(modules)}, {**public.tensors, **mine}


def split_peft_routers(
    config: dict[str, Any], tensors: dict[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor], PublicHead] | None:
    """Split PEFT's files into the method's configuration and tensors, and the routers; None: the
    whole modules are no routers, or there are none."""
    saved = tuple(config.get("modules_to_save") or ())
    if config.get("task_type") == "SEQ_CLS" or not saved:
        return None
    inside = {
        key: key.removeprefix(_PREFIX)
        for key in tensors
        if any(f".{module}." in key for module in saved) and ".lora_" not in key
    }
    if not inside or not all(_ROUTER.fullmatch(name) for name in inside.values()):
        return None
    others = {key: value for key, value in tensors.items() if key not in inside}
    routers = {name: tensors[key] for key, name in inside.items()}
    return {**config, "modules_to_save": None}, others, PublicHead((), routers)
