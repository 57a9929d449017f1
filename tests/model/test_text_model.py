"""The text model of a wrapper; tensors of a tower that files have in another form."""

from pathlib import Path

import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from dist_peft.model.text_model import find_text_model, make_tower_predicate
from tests.support.loaded_models import IDS, load, logits
from tests.support.tiny_models import CONFIGS, WRAPPERS, save_model


def build(name: str) -> tf.PreTrainedModel:
    auto = tf.AutoModelForImageTextToText if name in WRAPPERS else tf.AutoModelForCausalLM
    with torch.device("meta"):
        return auto.from_config((WRAPPERS | CONFIGS)[name])


def test_text_model_of_a_wrapper_and_of_a_language_model() -> None:
    wrapper = build("mistral3")
    assert find_text_model(wrapper) is wrapper.model.language_model
    llama = build("llama")
    assert find_text_model(llama) is llama


def test_only_towers_may_lack_tensors() -> None:
    may_lack = make_tower_predicate(build("mistral3"))
    assert may_lack("model.vision_tower.patch_conv.weight")
    assert may_lack("model.multi_modal_projector.linear_1.weight")
    assert not may_lack("model.language_model.layers.0.mlp.up_proj.weight")
    assert not may_lack("model.language_model.embed_tokens.weight")
    assert not may_lack("lm_head.weight")
    assert not make_tower_predicate(build("llama"))("model.norm.weight")


def test_a_tower_in_another_form_does_not_matter_to_text(tmp_path: Path) -> None:
    original = save_model(WRAPPERS["mistral3"], tmp_path, auto=tf.AutoModelForImageTextToText)
    file = tmp_path / "model.safetensors"
    other = {
        name.replace("vision_tower", "vision_encoder"): tensor
        for name, tensor in load_file(file).items()
    }
    save_file(other, file, metadata={"format": "pt"})
    loaded = load(tmp_path, quant=None)
    assert torch.equal(logits(loaded.model, input_ids=IDS), logits(original, input_ids=IDS))
