"""The class of ``transformers`` that builds and loads a model: ``AutoModelForCausalLM`` and others.

Families of text and images are published as one model with towers for images. Some of them are
registered as causal language models (Gemma 3, Llama 4, Qwen 3.5), most only as wrappers that take
images (Qwen2.5-VL, Qwen3-VL, Mistral 3) or sound. A wrapper that is given tokens alone is a
language model: its towers are not called, and so neither loaded nor gathered
(``model.parameter_readers``).
"""

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto import modeling_auto

from dist_peft.core.config.run import BaseConfig
from dist_peft.core.errors import UserError
from dist_peft.model import classifier
from dist_peft.model.hub import REFUSALS, format_library_error
from dist_peft.model.meta_device import EmptyOnMeta

__all__ = ["build_on_meta", "choose_auto_class", "is_classifier", "is_language_model"]

_WRAPPERS = {
    "AutoModelForImageTextToText": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "AutoModelForMultimodalLM": "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
}
"""Class of wrappers -> table of their model types; older versions have not all of them."""

_BUILT_AS_WRAPPERS = ("emu3",)
"""Types of which the causal class does not read the files of the whole model."""


def is_classifier(described: Mapping[str, Any]) -> bool:
    """Return whether a ``config.json`` names a sequence classifier."""
    names = described.get("architectures") or [""]
    return str(names[0]).endswith("ForSequenceClassification")


def is_language_model(kind: str) -> bool:
    """Return whether ``transformers`` has a model of this type that predicts text."""
    tables = ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", *_WRAPPERS.values())
    return any(kind in getattr(modeling_auto, table, {}) for table in tables)


def choose_auto_class(described: Mapping[str, Any]) -> Any:
    """Return the class that loads the model of a ``config.json``.

    Args:
        described: its content. A classifier is known by ``architectures``.

    Returns:
        ``AutoModelForCausalLM`` also where no class is known, so that its message names the type.
    """
    if is_classifier(described):
        return AutoModelForSequenceClassification
    kind, own_code = described.get("model_type"), described.get("auto_map") or {}
    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if kind in causal and kind not in _BUILT_AS_WRAPPERS:
        return AutoModelForCausalLM
    for name, table in _WRAPPERS.items():
        known = kind in getattr(modeling_auto, table, {}) or name in own_code
        if known and "AutoModelForCausalLM" not in own_code and hasattr(transformers, name):
            return getattr(transformers, name)
    return AutoModelForCausalLM


def build_on_meta(
    config: PretrainedConfig, base: BaseConfig, dtype: torch.dtype
) -> PreTrainedModel:
    """Build the model of ``base.head`` without weights.

    Raises:
        UserError: ``transformers`` has no such model, or it has an encoder and a decoder.
    """
    auto = classifier.MODELS[base.head]
    if base.head == "lm":
        auto = choose_auto_class({**config.to_dict(), "architectures": None})
    kind = f"base.path {base.path} of type {config.model_type!r}"
    if auto not in classifier.MODELS.values() and config.is_encoder_decoder:
        raise UserError(
            f"{kind} has an encoder and a decoder, and only decoders are trained; give another base"
        )
    try:
        with EmptyOnMeta():
            model: PreTrainedModel = auto.from_config(
                config,
                dtype=dtype,
                attn_implementation=None if base.attention == "auto" else base.attention,
                trust_remote_code=base.trust_remote_code,
            )
    except (*REFUSALS, RuntimeError) as error:
        raise UserError(
            f"transformers cannot build a {classifier.KINDS[base.head]} of type "
            f"{config.model_type!r} "
            f"with base.attention={base.attention!r}: {format_library_error(error)}"
        ) from None
    return model
