"""Find the export formats that would refuse a run, before it is trained."""

import logging
from importlib.util import find_spec
from pathlib import Path

from dist_peft.core.config.run import (
    BottleneckConfig,
    FusionConfig,
    Ia3Config,
    LoraConfig,
    PTuningConfig,
    QaLoraConfig,
    RunConfig,
    VirtualTokensConfig,
)
from dist_peft.core.errors import UserError
from dist_peft.core.log import ONCE
from dist_peft.export.float_bias import MLX_GROUPS, find_stored_group_size
from dist_peft.export.formats.kept_nf4 import KeptNf4Packer
from dist_peft.export.formats.registry import FORMATS
from dist_peft.model.experts import ExpertStack
from dist_peft.model.model_files import list_model_files
from dist_peft.model.skeleton import Skeleton, parse_torch_dtype

__all__ = ["FORMS", "KEPT_NF4", "find_export_obstacles", "log_export_outlook"]

log = logging.getLogger("dist_peft")

_ADAPTERS = ("peft", "peft-expanded")
_INTEGER_ZERO = ("gptq", "compressed-tensors")
_WEIGHT_KINDS = ("full", "partial")

KEPT_NF4 = "bnb-nf4 --keep-adapter"
"""A separate form: obstacles to a merge do not always apply to it."""

FORMS = tuple(
    form for name in FORMATS for form in ((name, KEPT_NF4) if name == "bnb-nf4" else (name,))
)
"""Forms that a run can be exported in: the formats and ``KEPT_NF4``."""


def find_export_obstacles(config: RunConfig, skeleton: Skeleton, directory: Path) -> dict[str, str]:
    """Return the reason for each form (``FORMS``) that this run cannot be written in.

    A form that is not in the result can be tried.

    Args:
        config: the run; ``base.quant`` is resolved from the files of a prequantized base.
        skeleton: the model without weights, with the adapter attached or without.
        directory: directory of the base's files.
    """
    merged = [name for name in FORMATS if name not in _ADAPTERS]
    refused = (
        dict.fromkeys(merged, reason) if (reason := _find_merge_obstacle(config, skeleton)) else {}
    )
    if reason := _find_kept_nf4_obstacle(config, skeleton):
        refused[KEPT_NF4] = reason
    try:
        list_model_files(directory, code=config.base.trust_remote_code)
    except UserError as error:
        refused = dict.fromkeys((*merged, KEPT_NF4), str(error)) | refused
    for name, reason in _find_format_obstacles(config, skeleton).items():
        refused.setdefault(name, reason)
    return {name: refused[name] for name in FORMS if name in refused}


def _find_kept_nf4_obstacle(config: RunConfig, skeleton: Skeleton) -> str | None:
    """Return why the base's NF4 codes cannot be kept with a separate adapter; None if they can."""
    adapter, quant = config.adapter, config.base.quant
    if adapter.kind in _WEIGHT_KINDS:
        return f"adapter.kind {adapter.kind} trains weights, no adapter"
    if isinstance(adapter, VirtualTokensConfig):
        return "virtual tokens change no weight; peft writes them for any base that PEFT loads"
    if isinstance(adapter, BottleneckConfig | FusionConfig):
        return "a nonlinear adapter cannot be merged; AdapterHub's library loads adapter/"
    if quant is None or quant.kind != "nf4":
        return "the base has no NF4 codes"
    try:
        packer = KeptNf4Packer(quant.group_size, parse_torch_dtype(config.base.compute_dtype))
        packer.check_model_linears(skeleton.model)
    except UserError as error:
        return str(error)
    return None


def _find_merge_obstacle(config: RunConfig, skeleton: Skeleton) -> str | None:
    adapter = config.adapter
    if isinstance(adapter, VirtualTokensConfig):
        return "virtual tokens change no weight"
    if isinstance(adapter, BottleneckConfig | FusionConfig):
        return "a nonlinear adapter cannot be merged; AdapterHub's library loads adapter/"
    if isinstance(adapter, LoraConfig) and adapter.embeddings and skeleton.tied:
        return (
            "adapter.embeddings adapts an embedding that the base's output head shares: one merged "
            "weight cannot be both; set adapter.embeddings: false to merge"
        )
    return None


def _find_format_obstacles(config: RunConfig, skeleton: Skeleton) -> dict[str, str]:
    adapter, quant = config.adapter, config.base.quant
    own: dict[str, str] = {}
    quantized = [name for name in FORMS if name not in (*_ADAPTERS, "hf-bf16")]
    if config.base.head == "classifier":
        own |= dict.fromkeys(quantized, "the format is for language models")
    if any(isinstance(module, ExpertStack) for module in skeleton.model.modules()):
        own |= dict.fromkeys(quantized, "the base is a mixture of experts")
    if adapter.kind in _WEIGHT_KINDS:
        own |= dict.fromkeys(_ADAPTERS, f"adapter.kind {adapter.kind} trains weights, no adapter")
    if isinstance(adapter, BottleneckConfig | FusionConfig):
        own |= dict.fromkeys(_ADAPTERS, "PEFT does not support this adapter")
    if isinstance(adapter, PTuningConfig) and adapter.pseudo_token is not None:
        own |= dict.fromkeys(_ADAPTERS, "PEFT only prepends virtual tokens")
    if quant is None or quant.kind != "int" or adapter.kind in _WEIGHT_KINDS:
        reason = "needs an integer base with a separate adapter (or --merge --lossy)"
        own = dict.fromkeys(_INTEGER_ZERO, reason) | own
    elif quant.solver == "hqq":
        own = dict.fromkeys(_INTEGER_ZERO, "hqq produces zeros that are not integers") | own
    if isinstance(adapter, Ia3Config):
        own = {"gptq": "PEFT does not support IA3 on GPTQ linears (or --merge --lossy)"} | own
    kept = quant is not None and quant.kind == "int" and isinstance(adapter, QaLoraConfig)
    if quant is not None and kept and not find_stored_group_size(quant.group_size, MLX_GROUPS):
        own.setdefault("mlx", f"mlx does not support groups of {quant.group_size}")
    if "gguf" not in own and find_spec("gguf") is not None:
        from dist_peft.export.formats.gguf_model import GgufModelLayout  # needs an optional package

        try:
            GgufModelLayout(skeleton)
        except UserError as error:
            own["gguf"] = str(error)
    return own


def log_export_outlook(config: RunConfig, skeleton: Skeleton, directory: Path) -> None:
    """Log once the forms that the run can be exported in, and the reasons against the others."""
    refused = find_export_obstacles(config, skeleton, directory)
    possible = [name for name in FORMS if name not in refused]
    reasons: dict[str, list[str]] = {}
    for name, reason in refused.items():
        reasons.setdefault(reason, []).append(name)
    against = "; ".join(f"not {', '.join(names)}: {reason}" for reason, names in reasons.items())
    level = logging.INFO if possible else logging.WARNING
    forms = ", ".join(possible) or "nothing (dist-peft eval --run reads it)"
    log.log(level, "exports of this run: %s%s", forms, f"; {against}" * bool(against), extra=ONCE)
