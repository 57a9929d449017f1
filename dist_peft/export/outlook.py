"""What a run can become, said before it is trained: formats that would refuse it at its end."""

import logging
from importlib.util import find_spec
from pathlib import Path

from dist_peft.core.config.run import (
    BottleneckConfig,
    FusionConfig,
    LoraConfig,
    PTuningConfig,
    QaLoraConfig,
    RunConfig,
    VirtualTokensConfig,
)
from dist_peft.core.errors import UserError
from dist_peft.core.log import ONCE
from dist_peft.export.float_bias import MLX_GROUPS, stored_group
from dist_peft.export.formats.kept_nf4 import KeptNf4
from dist_peft.export.formats.registry import FORMATS
from dist_peft.export.model_files import model_files
from dist_peft.model.experts import ExpertStack
from dist_peft.model.skeleton import Skeleton, torch_dtype

__all__ = ["FORMS", "KEPT_NF4", "export_outlook", "log_outlook"]

log = logging.getLogger("dist_peft")

_ADAPTERS = ("peft", "peft-expanded")
_INTEGER_ZERO = ("gptq", "compressed-tensors")
_WEIGHT_KINDS = ("full", "partial")

KEPT_NF4 = "bnb-nf4 --keep-adapter"
"""A form of its own: what hinders a merge need not hinder it."""

FORMS = tuple(
    form for name in FORMATS for form in ((name, KEPT_NF4) if name == "bnb-nf4" else (name,))
)
"""What a run can be exported as: the formats, and ``KEPT_NF4``."""


def export_outlook(config: RunConfig, skeleton: Skeleton, directory: Path) -> dict[str, str]:
    """Form (``FORMS``) -> why this run cannot be written as it; others can be tried.

    Args:
        config: the run; ``base.quant`` of a prequantized base is the base's.
        skeleton: with the adapter attached or without.
        directory: the base's files.
    """
    merged = [name for name in FORMATS if name not in _ADAPTERS]
    refused = dict.fromkeys(merged, reason) if (reason := _no_merge(config, skeleton)) else {}
    if reason := _no_kept_nf4(config, skeleton):
        refused[KEPT_NF4] = reason
    try:
        model_files(directory, code=config.base.trust_remote_code)
    except UserError as error:
        refused = dict.fromkeys((*merged, KEPT_NF4), str(error)) | refused
    for name, reason in _by_format(config, skeleton).items():
        refused.setdefault(name, reason)
    return {name: refused[name] for name in FORMS if name in refused}


def _no_kept_nf4(config: RunConfig, skeleton: Skeleton) -> str | None:
    """Why the base's NF4 codes cannot be kept with the adapter apart; None: they can."""
    adapter, quant = config.adapter, config.base.quant
    if adapter.kind in _WEIGHT_KINDS:
        return f"adapter.kind {adapter.kind} trains weights, no adapter"
    if isinstance(adapter, VirtualTokensConfig):
        return "virtual tokens change no weight; peft writes them for any base that PEFT loads"
    if isinstance(adapter, BottleneckConfig | FusionConfig):
        return "no weight can take in a nonlinear adapter; AdapterHub's library loads adapter/"
    if quant is None or quant.kind != "nf4":
        return "the base has no NF4 codes"
    try:
        packer = KeptNf4(quant.group_size, torch_dtype(config.base.compute_dtype))
        packer.check_linears(skeleton.model)
    except UserError as error:
        return str(error)
    return None


def _no_merge(config: RunConfig, skeleton: Skeleton) -> str | None:
    adapter = config.adapter
    if isinstance(adapter, VirtualTokensConfig):
        return "virtual tokens change no weight"
    if isinstance(adapter, BottleneckConfig | FusionConfig):
        return "no weight can take in a nonlinear adapter; AdapterHub's library loads adapter/"
    if isinstance(adapter, LoraConfig) and adapter.embeddings and skeleton.tied:
        return (
            "adapter.embeddings adapts an embedding that the base's output head shares: one merged "
            "weight cannot be both; set adapter.embeddings: false to merge"
        )
    return None


def _by_format(config: RunConfig, skeleton: Skeleton) -> dict[str, str]:
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
        own |= dict.fromkeys(_ADAPTERS, "PEFT has no such adapter")
    if isinstance(adapter, PTuningConfig) and adapter.pseudo_token is not None:
        own |= dict.fromkeys(_ADAPTERS, "PEFT puts virtual tokens in front only")
    if quant is None or quant.kind != "int" or adapter.kind in _WEIGHT_KINDS:
        reason = "the base is no integer base with an adapter to lie beside it (--merge --lossy)"
        own = dict.fromkeys(_INTEGER_ZERO, reason) | own
    elif quant.solver == "hqq":
        own = dict.fromkeys(_INTEGER_ZERO, "hqq makes zeros that are no integers") | own
    kept = quant is not None and quant.kind == "int" and isinstance(adapter, QaLoraConfig)
    if quant is not None and kept and not stored_group(quant.group_size, MLX_GROUPS):
        own.setdefault("mlx", f"mlx has no groups of {quant.group_size}")
    if "gguf" not in own and find_spec("gguf") is not None:
        from dist_peft.export.formats.gguf_model import GgufModel  # needs an optional package

        try:
            GgufModel(skeleton)
        except UserError as error:
            own["gguf"] = str(error)
    return own


def log_outlook(config: RunConfig, skeleton: Skeleton, directory: Path) -> None:
    """Say once what the run can be exported as, and as what not and why."""
    refused = export_outlook(config, skeleton, directory)
    possible = [name for name in FORMS if name not in refused]
    reasons: dict[str, list[str]] = {}
    for name, reason in refused.items():
        reasons.setdefault(reason, []).append(name)
    against = "; ".join(f"not {', '.join(names)}: {reason}" for reason, names in reasons.items())
    level = logging.INFO if possible else logging.WARNING
    told = ", ".join(possible) or "nothing (dist-peft eval --run reads it)"
    log.log(level, "exports of this run: %s%s", told, f"; {against}" * bool(against), extra=ONCE)
