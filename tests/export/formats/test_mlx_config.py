"""Keys of mlx-lm in ``config.json``; ``test_mlx_experts`` has mlx-lm load them."""

from typing import Any

import pytest
import transformers as tf

from dist_peft.export.formats.mlx_config import find_mlx_obstacle, make_mlx_keys
from tests.support.gguf_configs import config_of_family

KINDS = ("linear_attention", "full_attention")


def test_keys_of_transformers_4() -> None:
    keys = make_mlx_keys(config_of_family("qwen3_moe"), tied=False)
    assert (keys["rope_theta"], keys["rope_scaling"], keys["head_dim"]) == (10000.0, None, 16)
    assert keys["num_experts"] == keys["num_local_experts"] == 4
    assert keys["tie_word_embeddings"] is False and "dtype" not in keys
    config = config_of_family("gpt_oss")
    keys = make_mlx_keys(config, tied=True)
    assert keys["tie_word_embeddings"] is True and keys["rope_scaling"]["rope_type"] == "yarn"
    assert make_mlx_keys(config_of_family("qwen2"), tied=True)["head_dim"] == 16


def test_windows_of_gemma() -> None:
    config = config_of_family("gemma3_text")
    config.rope_parameters = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
        "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
    }
    keys = make_mlx_keys(config, tied=True)
    assert (keys["rope_theta"], keys["rope_local_base_freq"]) == (5e5, 2e4)
    assert keys["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}
    assert keys["sliding_window_pattern"] == 6
    assert find_mlx_obstacle(config, "gemma3_text") is None
    config.layer_types = ["full_attention", "sliding_attention"] * 3
    assert "in every n-th layer" in str(find_mlx_obstacle(config, "gemma3_text"))


def test_numbers_of_kimis_layers() -> None:
    config = tf.models.auto.configuration_auto.CONFIG_MAPPING["kimi_linear"](
        num_hidden_layers=4,
        layer_types=[KINDS[0]] * 3 + [KINDS[1]],
        mlp_layer_types=["dense", *["sparse"] * 3],
        linear_num_heads=2,
        linear_head_dim=16,
    )
    keys = make_mlx_keys(config, tied=False)
    linear = keys["linear_attn_config"]
    assert linear["kda_layers"] == [1, 2, 3] and linear["full_attn_layers"] == [4]
    assert (linear["num_heads"], linear["head_dim"]) == (2, 16)
    assert linear["short_conv_kernel_size"] == config.linear_conv_kernel_dim
    assert keys["first_k_dense_replace"] == 1 and keys["mla_use_nope"]


REFUSED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "not for bamba": ("llama", "bamba", {}),
    "not for llama4_text": ("llama4_text", "llama4_text", {}),
    "num_experts_per_tok 2": ("llama4_text", "llama4", {"num_experts_per_tok": 2}),
}


@pytest.mark.parametrize("message", REFUSED)
def test_models_that_mlx_has_not(message: str) -> None:
    family, kind, changes = REFUSED[message]
    config = config_of_family(family)
    config.update(changes)
    assert message in str(find_mlx_obstacle(config, kind))
    config.update({"num_experts_per_tok": 1})
    assert find_mlx_obstacle(config, "llama4") is None
