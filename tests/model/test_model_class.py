"""Which class builds a model, and wrappers of a text model that are trained on text."""

from pathlib import Path

import pytest
import torch
import transformers as tf

from dist_peft.core.config.run import BaseConfig
from dist_peft.core.errors import UserError
from dist_peft.model.model_class import (
    build_on_meta,
    choose_auto_class,
    is_classifier,
    is_language_model,
)
from dist_peft.model.parameter_readers import list_unread_parameters
from tests.support.loaded_models import IDS, load, logits
from tests.support.tiny_models import WRAPPERS, save_model


@pytest.mark.parametrize(
    ("described", "name"),
    [
        ({"model_type": "llama"}, "AutoModelForCausalLM"),
        ({"model_type": "gemma3"}, "AutoModelForCausalLM"),  # a wrapper that is registered as one
        ({"model_type": "qwen2_5_vl"}, "AutoModelForImageTextToText"),
        ({"model_type": "emu3"}, "AutoModelForImageTextToText"),  # its causal class lacks a mapping
        ({"model_type": "qwen2_audio"}, "AutoModelForMultimodalLM"),
        ({"model_type": "unknown"}, "AutoModelForCausalLM"),
        (
            {"model_type": "own", "auto_map": {"AutoModelForCausalLM": "a.B"}},
            "AutoModelForCausalLM",
        ),
        (
            {"model_type": "own", "auto_map": {"AutoModelForImageTextToText": "a.B"}},
            "AutoModelForImageTextToText",
        ),
        (
            {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]},
            "AutoModelForSequenceClassification",
        ),
    ],
)
def test_class_by_the_configuration(described: dict[str, object], name: str) -> None:
    assert choose_auto_class(described) is getattr(tf, name)
    assert is_classifier(described) == (name == "AutoModelForSequenceClassification")


def test_types_that_predict_text() -> None:
    assert is_language_model("llama") and is_language_model("qwen2_5_omni_thinker")
    assert not is_language_model("qwen2_5_omni_talker") and not is_language_model("siglip")


@pytest.mark.parametrize("family", WRAPPERS)
def test_text_of_a_wrapper_is_computed_and_its_towers_are_not_loaded(
    family: str, tmp_path: Path
) -> None:
    original = save_model(WRAPPERS[family], tmp_path, auto=tf.AutoModelForImageTextToText)
    loaded = load(tmp_path, quant=None)
    assert torch.equal(logits(loaded.model, input_ids=IDS), logits(original, input_ids=IDS))
    names = {id(module): name for name, module in loaded.model.named_modules()}
    assert [names[id(block)] for block in loaded.blocks] == [
        f"model.language_model.layers.{number}" for number in range(2)
    ]
    unread = list_unread_parameters(loaded.model)
    towers = {
        name: parameter
        for name, parameter in loaded.model.named_parameters()
        if ".visual." in name or ".vision_tower." in name or "projector" in name
    }
    assert towers
    assert all(id(p) in unread and p.is_meta for p in towers.values())
    assert not any(p.is_meta for n, p in loaded.model.named_parameters() if n not in towers)


def test_an_encoder_decoder_is_refused() -> None:
    config = tf.Florence2Config()
    base = BaseConfig(path="florence", quant=None)
    with pytest.raises(
        UserError, match="florence of type 'florence2' has an encoder and a decoder"
    ):
        build_on_meta(config, base, torch.float32)
