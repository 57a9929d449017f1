"""Hyperparameters in the metadata, read by the gguf package."""

import logging
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers as tf
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from dist_peft.export.formats.gguf_families import FAMILIES
from dist_peft.export.formats.gguf_metadata import (
    add_model_metadata,
    compute_rope_factors,
    find_rope_obstacle,
    get_head_dim,
)
from tests.support.export_runs import llama
from tests.support.gguf_configs import config_of_family

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}


def fields_of(config: tf.PretrainedConfig, directory: Path) -> dict[str, Any]:
    """Without the name of the architecture."""
    name = gguf.MODEL_ARCH_NAMES[FAMILIES[config.model_type].architecture]
    writer = gguf.GGUFWriter(directory / "a.gguf", name)
    add_model_metadata(writer, config, "base", 0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    fields = gguf.GGUFReader(directory / "a.gguf").fields
    return {key.removeprefix(f"{name}."): field.contents() for key, field in fields.items()}


WANTED: dict[str, dict[str, Any]] = {
    "gpt_oss": {
        "expert_count": 4,
        "expert_used_count": 2,
        "expert_feed_forward_length": 96,
        "attention.sliding_window": 8,
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 32.0,
        "rope.scaling.original_context_length": 4096,
        "rope.scaling.yarn_beta_fast": 32.0,
    },
    "deepseek_v3": {
        "attention.key_length": 32,
        "attention.value_length": 16,
        "rope.dimension_count": 16,
        "attention.q_lora_rank": 32,
        "attention.kv_lora_rank": 32,
        "expert_gating_func": 2,
        "expert_group_count": 2,
        "expert_weights_scale": 2.5,
        "leading_dense_block_count": 1,
    },
    "llama4_text": {"feed_forward_length": 96, "interleave_moe_layer_step": 2},
    "cohere": {"attention.layer_norm_epsilon": pytest.approx(1e-5), "logit_scale": 0.0625},
    "granite": {"embedding_scale": 2.0, "attention.scale": pytest.approx(0.2)},
    "glm4": {"rope.dimension_count": 8},
}


@pytest.mark.parametrize("family", WANTED)
def test_keys_of_families(family: str, tmp_path: Path) -> None:
    fields = fields_of(config_of_family(family), tmp_path)
    assert {key: fields.get(key) for key in WANTED[family]} == WANTED[family]


def test_context_ends_with_a_window_that_llama_cpp_has_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of_family("mistral")
    assert fields_of(config, tmp_path)["context_length"] == 64
    config.sliding_window = 8
    with caplog.at_level(logging.WARNING, "dist_peft"):
        fields = fields_of(config, tmp_path)
    assert fields["context_length"] == 8 and "attention.sliding_window" not in fields
    assert "without its sliding window of 8 tokens" in caplog.text
    config = config_of_family("gemma2")
    fields = fields_of(config, tmp_path)
    assert (fields["context_length"], fields["attention.sliding_window"]) == (64, 8)


def test_rotary_scalings(tmp_path: Path) -> None:
    config = config_of_family("qwen3")
    config.rope_parameters = YARN
    assert find_rope_obstacle(config) is None
    config.rope_parameters = {**YARN, "attention_factor": 1.0}
    assert "scales attention by another factor" in str(find_rope_obstacle(config))
    config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0}
    assert "no rotary scaling 'dynamic'" in str(find_rope_obstacle(config))
    config = config_of_family("deepseek_v3")
    config.rope_parameters = YARN
    assert "scales attention by another factor" in str(find_rope_obstacle(config))
    config.rope_parameters = {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}
    assert find_rope_obstacle(config) is None
    fields = fields_of(config, tmp_path)
    assert fields["rope.scaling.yarn_log_multiplier"] == pytest.approx(0.1)
    assert get_head_dim(config) == 32


def test_llama3_factors_are_those_of_transformers() -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    config = llama(rope_parameters=rope)
    found = compute_rope_factors(config)
    assert found is not None and compute_rope_factors(llama()) is None
    plain = 10000.0 ** -(torch.arange(0, 16, 2) / 16)
    scaled = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))[0]
    torch.testing.assert_close(plain / found, scaled, rtol=1e-5, atol=0)
