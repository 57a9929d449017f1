"""AdaLoRA on disk, in the format of Hugging Face PEFT.

::

    adapter_config.json         PEFT's AdaLoraConfig; rank_pattern: PATH.lora_E -> which triplets
                                of the init_r are in the file
    adapter_model.safetensors   base_model.model.PATH.lora_A [r, in], .lora_E [r, 1],
                                .lora_B [out, r], without the triplets that were dropped

A triplet is dropped where its number in ``E`` is zero: it changes nothing. A module may have none
left; its tensors are then empty. An adapter of which no ``E`` was trained is written whole.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dist_peft.adapters.adalora.layer import RANK_EPSILON
from dist_peft.adapters.low_rank.delta_format import DeltaFormat
from dist_peft.adapters.low_rank.delta_merger import ProductDelta, WeightDelta
from dist_peft.adapters.peft_tensors import (
    build_linears_config,
    check_tensor_shape,
    group_peft_tensors,
    name_module_tensors,
    to_json_number,
)
from dist_peft.adapters.protocol import PublicAdapter
from dist_peft.core.config.run import AdaLoraConfig
from dist_peft.core.errors import UserError

__all__ = ["AdaLoraFormat", "build_public_adalora", "parse_adalora_tensors"]


class AdaLoraFormat(DeltaFormat):
    """AdaLoRA in PEFT's files: three tensors a module."""

    peft_types = ("ADALORA",)
    method_name = "AdaLoRA"

    def parse_deltas(self, public: PublicAdapter) -> Mapping[str, WeightDelta]:
        """Return module path -> its change. See ``parse_adalora_tensors``."""
        return parse_adalora_tensors(public)

    def describe(self, config: Mapping[str, Any]) -> str:
        """Return type, ranks and alpha."""
        shown = f"ADALORA init_r={config.get('init_r')} target_r={config.get('target_r')} "
        return f"{shown}alpha={config.get('lora_alpha')}"


def parse_adalora_tensors(public: PublicAdapter) -> dict[str, ProductDelta]:
    """Return module path -> its change, with every shape checked.

    Raises:
        UserError: a tensor is absent, of another method or shape.
    """
    config = public.config
    if config.get("bias", "none") != "none":
        raise UserError("the AdaLoRA adapter was trained with bias; merge it with PEFT itself")
    modules = group_peft_tensors(
        public,
        ("lora_A", "lora_E", "lora_B"),
        "AdaLoRA",
        may_be_empty=True,
    )
    first, alpha = _read_rank_and_alpha(config)
    found = {}
    for path, own in modules.items():
        r = _read_kept_rank(path, config, first)
        A = check_tensor_shape(path, own, "lora_A", (r, None))
        E = check_tensor_shape(path, own, "lora_E", (r, 1))
        B = check_tensor_shape(path, own, "lora_B", (None, r))
        found[path] = ProductDelta(B, A * E * (alpha / (first + RANK_EPSILON)))
    return found


def _read_rank_and_alpha(config: Mapping[str, Any]) -> tuple[int, float]:
    r, alpha = config.get("init_r"), config.get("lora_alpha")
    if not isinstance(r, int) or r < 1 or not isinstance(alpha, int | float):
        raise UserError(
            f"adapter_config.json gives no usable init_r and lora_alpha: {r!r}, {alpha!r}"
        )
    return r, float(alpha if alpha > 0 else r)


def _read_kept_rank(path: str, config: Mapping[str, Any], first: int) -> int:
    pattern = config.get("rank_pattern") or {}
    if not isinstance(pattern, dict):
        raise UserError(f"adapter_config.json: rank_pattern is {pattern!r}, no map")
    kept = pattern.get(f"{path}.lora_E", [True] * first)
    if not isinstance(kept, list) or len(kept) != first or set(kept) - {True, False}:
        raise UserError(
            f"adapter_config.json: rank_pattern of {path}.lora_E must have {first} truth values"
        )
    return sum(kept)


def build_public_adalora(
    config: AdaLoraConfig,
    modules: Mapping[str, Mapping[str, Tensor]],
    target_names: Sequence[str],
    base: str,
    *,
    total_steps: int,
) -> PublicAdapter:
    """Trained parameters -> public form.

    Args:
        modules: module path -> own parameter name -> whole tensor.
        target_names: PEFT's ``target_modules``.
        base: path or hub id of the base.
        total_steps: of the run; 0 where it is not known.
    """
    is_trained = any(bool(own["lora_E"].any()) for own in modules.values())
    kept = {
        path: own["lora_E"] != 0 if is_trained else torch.ones(config.init_r, dtype=torch.bool)
        for path, own in modules.items()
    }
    public = {
        **build_linears_config("ADALORA", target_names, base),
        "init_r": config.init_r,
        "target_r": config.target_r,
        "lora_alpha": to_json_number(config.alpha),
        "lora_dropout": config.dropout,
        "tinit": config.tinit,
        "tfinal": config.tfinal,
        "deltaT": config.delta_t,
        "beta1": config.beta1,
        "beta2": config.beta2,
        "orth_reg_weight": config.orth_reg_weight,
        # PEFT loads no adapter whose schedule is empty
        "total_step": max(total_steps, config.tinit + config.tfinal + 1),
        "rank_pattern": {f"{path}.lora_E": own.tolist() for path, own in kept.items()},
        "fan_in_fan_out": False,
        "bias": "none",
        "init_lora_weights": True,
    }
    tensors = {
        path: {
            "lora_A": own["lora_A"][kept[path]],
            "lora_E": own["lora_E"][kept[path], None],
            "lora_B": own["lora_B"][:, kept[path]],
        }
        for path, own in modules.items()
    }
    return PublicAdapter(public, name_module_tensors(tensors))
