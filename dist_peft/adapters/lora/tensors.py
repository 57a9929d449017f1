"""Parse and check the tensors of a LoRA or QA-LoRA adapter.

Names in the file are PEFT's (``adapters.directory``), shapes come from the configuration, and
QA-LoRA's factors are brought to one convention (``adapters.low_rank.pooling``).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from dist_peft.adapters.lora.expert_format import split_expert_factors, to_expert_stack_path
from dist_peft.adapters.low_rank.pooling import Pooling, pooling_sum_factor, read_pooling_facts
from dist_peft.adapters.protocol import PublicAdapter
from dist_peft.adapters.targets import resolve_pattern_value
from dist_peft.core.errors import UserError

__all__ = ["MASKED_TYPE", "LoraTensors", "build_peft_key", "parse_lora_tensors"]

MASKED_TYPE = "MASKED_LORA"
"""``peft_type`` of a LoRA whose change is cut off where the base is zero. PEFT does not know it: as
plain LoRA it would silently apply the whole change."""

_PREFIX = "base_model.model."
_SUFFIXES = {
    "lora_A": "lora_A.weight",
    "lora_B": "lora_B.weight",
    "magnitude": "lora_magnitude_vector",
    "lora_embedding_A": "lora_embedding_A",
    "lora_embedding_B": "lora_embedding_B",
    "saved_base": "base_layer.weight",
}

_UNSUPPORTED = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "modules_to_save",
    "monteclora_config",
    "trainable_token_indices",
    "use_bdlora",
    "velora_config",
)
_CHANGES_BASE = ("corda", "loftq", "lora_ga", "olora", "pissa")


@dataclass(frozen=True)
class LoraTensors:
    """One adapted module of a public adapter, float32.

    Attributes:
        A, B: ``[r, in]``, ``[out, r]``; of an embedding ``[r, vocab]``, ``[hidden, r]``; of QA-LoRA
            ``[r, in / pool]``, ``[out, r]``, under the sum convention.
        scaling: ``s``.
        magnitude: ``[out]`` with DoRA.
        is_embedding: the weight is ``[vocab, hidden]``, so its change is ``s (B A)^T``.
        saved_base: copy of the base weight that PEFT stores with an adapted embedding.
        pool: inputs summed into one before ``A``; 1 for plain LoRA.
        experts: how many weights are stacked in ``B``'s rows and ``A``'s, ``[experts * r, in]`` and
            ``[experts * out, r]``; 1 where it is no stack.
    """

    A: Tensor
    B: Tensor
    scaling: float
    magnitude: Tensor | None
    is_embedding: bool
    saved_base: Tensor | None
    pool: int = 1
    experts: int = 1

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight, ``[out, in]``; ``[vocab, hidden]`` for an embedding."""
        if self.is_embedding:
            return self.A.shape[1], self.B.shape[0]
        return self.B.shape[0], self.A.shape[1] * self.pool

    def expanded_lora_A(self) -> Tensor:
        """``A`` of the LoRA that computes the same, ``[r, in]``."""
        return self.A if self.pool == 1 else self.A.repeat_interleave(self.pool, 1)


def build_peft_key(path: str, name: str) -> str:
    """Name in the file of the own parameter ``name`` of a module."""
    return f"{_PREFIX}{path}.{_SUFFIXES[name]}"


def parse_lora_tensors(public: PublicAdapter) -> dict[str, LoraTensors]:
    """Module path -> its factors, with every shape checked against the configuration.

    Raises:
        UserError: a tensor is empty, has the wrong shape, lacks its partner or is none of LoRA's;
            or the adapter uses something besides LoRA, rsLoRA and DoRA.
    """
    _check_lora_config(public)
    pooling = read_pooling_facts(public.config)
    modules: dict[str, dict[str, Tensor]] = {}
    for key, value in public.tensors.items():
        path, name = _parse_peft_key(key)
        if value.numel() == 0:
            raise UserError(
                f"adapter tensor {key} is empty: the adapter was saved without its data"
            )
        modules.setdefault(path, {})[name] = value
    if not modules:
        raise UserError("the adapter has no tensors: it was saved without its data")
    targets = public.config.get("target_parameters") or ()
    plain: dict[str, LoraTensors] = {}
    for path, own in modules.items():
        stack = to_expert_stack_path(path, targets)
        if stack is None:
            plain[path] = _parse_module_factors(path, own, public.config)
        else:
            plain[stack] = _parse_expert_factors(path, stack, own, public.config)
    if pooling is None:
        return plain
    return {path: _attach_pooling(path, module, pooling) for path, module in plain.items()}


def _attach_pooling(path: str, module: LoraTensors, pooling: Pooling) -> LoraTensors:
    """Under the sum convention."""
    if module.is_embedding or module.magnitude is not None:
        raise UserError(f"{path}: QA-LoRA is for linears, without DoRA; the adapter is damaged")
    factor = pooling_sum_factor(pooling, module.A.shape[1])
    return replace(module, B=module.B * factor, pool=pooling.size)


def _check_lora_config(public: PublicAdapter) -> None:
    config = public.config
    used = [key for key in _UNSUPPORTED if config.get(key)]
    if config.get("bias", "none") != "none":
        used.append("bias")
    if used:
        raise UserError(
            f"the adapter was trained with {used[0]}, which is more than LoRA, rsLoRA and DoRA and "
            "would be lost; merge it with PEFT itself"
        )
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise UserError(
            f"the adapter was trained on a changed base (init_lora_weights: {start}) and does not "
            "fit the original one; save it again with PEFT's save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...) or merge it with PEFT itself"
        )


def _parse_peft_key(key: str) -> tuple[str, str]:
    """Tensor name in the file -> (module path, own name)."""
    stem = key.removesuffix(".weight") if key.endswith("lora_magnitude_vector.weight") else key
    for name, suffix in _SUFFIXES.items():
        if stem.startswith(_PREFIX) and stem.endswith(f".{suffix}"):
            return stem[len(_PREFIX) : -len(suffix) - 1], name
    raise UserError(f"adapter tensor {key} is no LoRA tensor; merge this adapter with PEFT itself")


def _parse_expert_factors(
    path: str, stack: str, own: Mapping[str, Tensor], config: Mapping[str, Any]
) -> LoraTensors:
    """Of the experts ``stack``, whose tensors begin with ``path``."""
    r, scaling = _resolve_rank_and_scaling(stack, config)
    if set(own) != {"lora_A", "lora_B"}:
        raise UserError(f"adapter tensors of {_PREFIX}{path} are not one lora_A and one lora_B")
    A, B = own["lora_A"], own["lora_B"]
    _check_tensor_shape(path, "lora_A", A, (None, None))
    if A.shape[0] % r:
        raise UserError(
            f"adapter tensor {_PREFIX}{path}.lora_A.weight has shape {list(A.shape)}, which are no "
            f"whole experts of rank {r}"
        )
    _check_tensor_shape(path, "lora_B", B, (None, A.shape[0]))
    A, B = split_expert_factors(A.float(), B.float(), r)
    return LoraTensors(A, B, scaling, None, False, None, experts=A.shape[0] // r)


def _resolve_rank_and_scaling(path: str, config: Mapping[str, Any]) -> tuple[int, float]:
    try:
        r = int(resolve_pattern_value(config.get("rank_pattern") or {}, path, config["r"]))
        alpha = float(
            resolve_pattern_value(config.get("alpha_pattern") or {}, path, config["lora_alpha"])
        )
        if r < 1 or not math.isfinite(alpha):
            raise ValueError(f"r is {r}, lora_alpha {alpha}")
        return r, alpha / (r**0.5 if config.get("use_rslora") else r)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(
            f"adapter_config.json gives {path} no usable r and lora_alpha "
            f"({type(error).__name__}: {error})"
        ) from None


def _parse_module_factors(
    path: str, own: Mapping[str, Tensor], config: Mapping[str, Any]
) -> LoraTensors:
    r, scaling = _resolve_rank_and_scaling(path, config)
    is_embedding = any(name.startswith("lora_embedding") for name in own)
    name_a, name_b = (
        ("lora_embedding_A", "lora_embedding_B") if is_embedding else ("lora_A", "lora_B")
    )
    for name in (name_a, name_b):
        if name not in own:
            raise UserError(f"adapter tensor {_PREFIX}{path}.{_SUFFIXES[name]} is absent")
    A, B, magnitude = own[name_a], own[name_b], own.get("magnitude")
    if is_embedding and magnitude is not None:
        raise UserError(f"{path}: DoRA on an embedding is not supported; merge it with PEFT itself")
    _check_tensor_shape(path, name_a, A, (r, None))
    _check_tensor_shape(path, name_b, B, (None, r))
    if magnitude is not None:
        _check_tensor_shape(path, "magnitude", magnitude, (B.shape[0],))
    return LoraTensors(
        A.float(),
        B.float(),
        scaling,
        None if magnitude is None else magnitude.float(),
        is_embedding,
        own.get("saved_base"),
    )


def _check_tensor_shape(
    path: str, name: str, value: Tensor, wanted: tuple[int | None, ...]
) -> None:
    """``None`` in ``wanted`` stands for any size."""
    fits = value.dim() == len(wanted) and all(
        size is None or size == found for size, found in zip(wanted, value.shape, strict=True)
    )
    if not fits:
        shown = ", ".join("*" if size is None else str(size) for size in wanted)
        raise UserError(
            f"adapter tensor {_PREFIX}{path}.{_SUFFIXES[name]} has shape {list(value.shape)}, not "
            f"[{shown}] as its configuration says"
        )
