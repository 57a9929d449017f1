"""Models that predict nothing from text alone are refused with the input that they want."""

from pathlib import Path

import pytest
import torch
import transformers as tf

from dist_peft.core.config.run import BaseConfig
from dist_peft.core.errors import UserError
from dist_peft.model.skeleton import build_skeleton
from dist_peft.model.text_inputs import refuse_other_inputs, refuse_wanted_inputs
from tests.support.tiny_models import CONFIGS, save_model

_TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 97}
_VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "image_size": 28}
_HEADS = {"num_attention_heads": 2}


def build_on_meta(config: tf.PretrainedConfig, kind: type) -> tf.PreTrainedModel:
    with torch.device("meta"):
        return kind(config)  # type: ignore[no-any-return]


def test_inputs_of_the_signature() -> None:
    config = tf.BlipConfig(text_config={**_TEXT, **_HEADS}, vision_config={**_VISION, **_HEADS})
    model = build_on_meta(config, tf.BlipForConditionalGeneration)
    with pytest.raises(
        UserError,
        match="base of type 'blip' predicts nothing from text alone: "
        "BlipForConditionalGeneration wants pixel_values;",
    ):
        refuse_other_inputs(model, "base")


@pytest.mark.parametrize("family", ["llama", "opt", "qwen3"])
def test_decoders_take_text_alone(family: str) -> None:
    with torch.device("meta"):
        refuse_other_inputs(tf.AutoModelForCausalLM.from_config(CONFIGS[family]), "base")


def test_a_model_that_is_run_in_parts() -> None:
    config = tf.Qwen2_5OmniConfig(
        thinker_config={
            "text_config": {**_TEXT, **_HEADS, "num_key_value_heads": 2},
            "vision_config": {"depth": 1, "hidden_size": 32, "num_heads": 2},
            "audio_config": {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2},
        },
        enable_audio_output=False,
    )
    model = build_on_meta(config, tf.Qwen2_5OmniForConditionalGeneration)
    with pytest.raises(
        UserError,
        match=r"has no forward to train.*Qwen2_5OmniForConditionalGeneration.from_pretrained\(...\)"
        r".thinker.save_pretrained\(DIR\)\) and give DIR",
    ):
        refuse_other_inputs(model, "base")


def test_an_input_that_the_code_asks_for(tmp_path: Path) -> None:
    """The signature has a default for it."""
    config = tf.Kosmos2Config(
        text_config={
            "vocab_size": 97,
            "embed_dim": 32,
            "layers": 1,
            "ffn_dim": 48,
            "attention_heads": 2,
            "max_position_embeddings": 64,
        },
        vision_config={**_VISION, **_HEADS, "patch_size": 14},
        latent_query_num=2,
    )
    save_model(config, tmp_path, auto=tf.AutoModelForImageTextToText)
    base = BaseConfig(path=str(tmp_path), quant=None)
    with pytest.raises(
        UserError,
        match="of type 'kosmos-2' predicts nothing from text alone: "
        r"Kosmos2ForConditionalGeneration says '.*`pixel_values`.*' \(modeling_kosmos2.py, line "
        r"\d+\)",
    ):
        build_skeleton(base, tmp_path)


def test_other_errors_say_nothing_of_inputs() -> None:
    """One of a library, of this file, and of another kind."""
    model = build_on_meta(CONFIGS["llama"], tf.LlamaForCausalLM)
    for fail in (lambda: torch.ones(2).view(3), lambda: int("x"), lambda: {}["x"]):
        with pytest.raises((RuntimeError, ValueError, KeyError)) as caught:
            fail()  # type: ignore[no-untyped-call]
        refuse_wanted_inputs(model, caught.value, "base")
