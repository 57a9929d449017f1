"""Tensors and numbers in PEFT's files, as most of its methods store them.

::

    base_model.model.PATH.NAME    of the module PATH
    base_model.NAME               of the whole adapter
"""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from dist_peft.adapters.protocol import PublicAdapter
from dist_peft.adapters.targets import resolve_pattern_value
from dist_peft.core.config.run import LowRankConfig
from dist_peft.core.errors import UserError
from dist_peft.model.frozen_linear import FrozenLinear

__all__ = [
    "MODULE_PREFIX",
    "build_linears_config",
    "build_rank_config",
    "check_tensor_shape",
    "describe_rank_config",
    "group_peft_tensors",
    "iterate_ranked_modules",
    "mark_transposed",
    "name_module_tensors",
    "read_rank_and_alpha",
    "to_json_number",
]

MODULE_PREFIX = "base_model.model."


def build_linears_config(peft_type: str, target_names: Sequence[str], base: str) -> dict[str, Any]:
    """Return the keys of ``adapter_config.json`` that all methods on linears have."""
    return {
        "peft_type": peft_type,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "target_modules": list(target_names),
        "modules_to_save": None,
    }


def build_rank_config(config: LowRankConfig) -> dict[str, Any]:
    """Return PEFT's keys of ranks and alphas, as LoHa and LoKr have them."""
    return {
        "r": config.r,
        "alpha": to_json_number(config.alpha),
        "rank_dropout": 0.0,
        "module_dropout": 0.0,
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": {key: to_json_number(a) for key, a in config.alpha_pattern.items()},
        "init_weights": True,
    }


def describe_rank_config(config: Mapping[str, Any]) -> str:
    """Return type, rank and alpha in one line."""
    return f"{config['peft_type']} r={config.get('r')} alpha={config.get('alpha')}"


def name_module_tensors(modules: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Module path -> own name -> tensor becomes name in the file -> tensor."""
    return {
        f"{MODULE_PREFIX}{path}.{name}": value.contiguous()
        for path, own in modules.items()
        for name, value in own.items()
    }


def group_peft_tensors(
    public: PublicAdapter,
    names: Collection[str],
    method_name: str,
    *,
    whole_adapter: Collection[str] = (),
    may_be_empty: bool = False,
) -> dict[str, dict[str, Tensor]]:
    """Return module path -> own name -> tensor, as stored.

    Args:
        names: of the tensors that a module may have, such as ``hada_w1_a``.
        method_name: its name, for messages.
        whole_adapter: names of tensors of the whole adapter, which are left out.
        may_be_empty: whether tensors without elements are allowed.

    Raises:
        UserError: a tensor is empty or none of the method's, or there is none.
    """
    if public.config.get("modules_to_save"):
        raise UserError(
            f"the {method_name} adapter was trained with modules_to_save, which is not read here "
            "and would be lost; merge it with PEFT itself"
        )
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in public.tensors.items():
        if key.removeprefix("base_model.") in whole_adapter:
            continue
        path, _, name = key.removeprefix(MODULE_PREFIX).rpartition(".")
        if name not in names or not path or not key.startswith(MODULE_PREFIX):
            raise UserError(
                f"adapter tensor {key} is no {method_name} tensor; merge this adapter with PEFT "
                "itself"
            )
        if value.numel() == 0 and not may_be_empty:
            raise UserError(
                f"adapter tensor {key} is empty: the adapter was saved without its data"
            )
        found.setdefault(path, {})[name] = value
    if not found:
        raise UserError("the adapter has no tensors: it was saved without its data")
    return found


def check_tensor_shape(
    path: str, tensors: Mapping[str, Tensor], name: str, wanted: tuple[int | None, ...]
) -> Tensor:
    """Return tensor ``name`` of a module, float32.

    Args:
        wanted: its shape; ``None`` stands for any size.

    Raises:
        UserError: it is absent or has another shape.
    """
    key = f"{MODULE_PREFIX}{path}.{name}"
    if name not in tensors:
        raise UserError(f"adapter tensor {key} is absent")
    value = tensors[name]
    fits = value.dim() == len(wanted) and all(
        size is None or size == found for size, found in zip(wanted, value.shape, strict=True)
    )
    if not fits:
        shown = ", ".join("*" if size is None else str(size) for size in wanted)
        raise UserError(
            f"adapter tensor {key} has shape {list(value.shape)}, not [{shown}] as its "
            "configuration says"
        )
    return value.float()


def read_rank_and_alpha(path: str, config: Mapping[str, Any]) -> tuple[int, float]:
    """Return ``r`` and ``alpha`` of a module of a configuration with patterns.

    Raises:
        UserError: they are absent or no usable numbers.
    """
    try:
        r = int(resolve_pattern_value(config.get("rank_pattern") or {}, path, config["r"]))
        patterns = config.get("alpha_pattern") or {}
        alpha = float(resolve_pattern_value(patterns, path, config["alpha"]))
        if r < 1 or not math.isfinite(alpha):
            raise ValueError(f"r is {r}, alpha {alpha}")
        return r, alpha
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(
            f"adapter_config.json gives {path} no usable r and alpha "
            f"({type(error).__name__}: {error})"
        ) from None


def iterate_ranked_modules(
    public: PublicAdapter, names: Collection[str], method_name: str
) -> Iterator[tuple[str, dict[str, Tensor], int, float]]:
    """Yield path, tensors by own name, ``r`` and ``alpha / r`` of each module.

    Args:
        names, method_name: see ``group_peft_tensors``.

    Raises:
        UserError: see ``group_peft_tensors`` and ``read_rank_and_alpha``.
    """
    for path, own in group_peft_tensors(public, names, method_name).items():
        r, alpha = read_rank_and_alpha(path, public.config)
        yield path, own, r, alpha / r


def to_json_number(value: float) -> float:
    """Return whole numbers as ``int``: some readers of ``alpha`` take nothing else."""
    return int(value) if float(value).is_integer() else value


def mark_transposed(public: PublicAdapter, layers: Iterable[nn.Module]) -> PublicAdapter:
    """Return ``public`` with PEFT's ``fan_in_fan_out`` set where a linear below ``layers`` is
    stored transposed (``Conv1D``)."""
    bases = [getattr(layer, "base", None) for layer in layers]
    if not any(isinstance(base, FrozenLinear) and base.is_transposed for base in bases):
        return public
    return replace(public, config={**public.config, "fan_in_fan_out": True})
