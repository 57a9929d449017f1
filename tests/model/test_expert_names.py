"""Names of single experts by ``transformers``, and the rows that each has."""

from pathlib import Path
from typing import Any

import torch
import transformers as tf

from dist_peft.core.config.run import BaseConfig
from dist_peft.core.span import Span
from dist_peft.model.expert_names import list_expert_names
from dist_peft.model.experts import ExpertStack
from dist_peft.model.skeleton import build_skeleton
from tests.support.tiny_models import MIXTURES, save_model

_SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}
_AXES = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}


def build(config: tf.PretrainedConfig) -> tf.PreTrainedModel:
    with torch.device("meta"):
        return tf.AutoModelForCausalLM.from_config(config)


def test_published_names_of_mixtral() -> None:
    model = build(MIXTURES["mixtral"])
    path = "model.layers.1.mlp.experts"
    found = list_expert_names(model, f"{path}.gate_up_proj", 4, 208)
    assert found is not None
    owner = "model.layers.1.block_sparse_moe.experts"
    assert found[:3] == [
        (f"{owner}.0.w1.weight", Span(0, 104)),
        (f"{owner}.0.w3.weight", Span(104, 208)),
        (f"{owner}.1.w1.weight", Span(208, 312)),
    ]
    assert len(found) == 8
    found = list_expert_names(model, f"{path}.down_proj", 4, 64)
    assert found == [(f"{owner}.{e}.w2.weight", Span(64 * e, 64 * e + 64)) for e in range(4)]


def test_names_of_qwen_for_any_number_of_experts() -> None:
    model = build(MIXTURES["qwen3_moe"])
    found = list_expert_names(model, "model.layers.1.mlp.experts.down_proj", 12, 64)
    assert found is not None and [name.split(".")[5] for name, _ in found] == [
        str(expert) for expert in range(12)
    ]


def test_a_conversion_that_reads_the_parameter(tmp_path: Path) -> None:
    """Qwen3-VL-MoE's stacks are transposed in the files; here they are no parameters any more."""
    text = {**_SMALL, "moe_intermediate_size": 32, "num_experts": 4, "num_key_value_heads": 4}
    vision = {"hidden_size": 32, "intermediate_size": 48, "depth": 2, "num_heads": 2}
    config = tf.Qwen3VLMoeConfig(
        text_config={**text, "rope_parameters": _AXES},
        vision_config={**vision, "out_hidden_size": 64, "deepstack_visual_indexes": [0]},
    )
    save_model(config, tmp_path, auto=tf.AutoModelForImageTextToText)
    model = build_skeleton(BaseConfig(path=str(tmp_path)), tmp_path).model
    stacks = {n: m for n, m in model.named_modules() if isinstance(m, ExpertStack)}
    assert len(stacks) == 2
    assert all(list_expert_names(model, n, 4, m.out_features) is None for n, m in stacks.items())


def test_families_that_are_published_as_stacks() -> None:
    config = tf.GraniteMoeConfig(**_SMALL, num_local_experts=4)
    model = build(config)
    stacks = [n for n, p in model.named_parameters() if p.dim() == 3]
    assert stacks
    assert all(
        list_expert_names(model, n, 4, model.get_parameter(n).shape[1]) is None for n in stacks
    )
