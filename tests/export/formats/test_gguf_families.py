"""Settings that llama.cpp has in its code; the file of each family is in
``test_gguf_format``."""

import re
from typing import Any

import pytest

from dist_peft.export.formats.gguf_families import (
    FAMILIES,
    find_family_obstacle,
    find_window,
)
from tests.support.gguf_configs import config_of_family


@pytest.mark.parametrize("family", FAMILIES)
def test_published_settings_have_no_obstacle(family: str) -> None:
    assert find_family_obstacle(config_of_family(family)) is None


FULL = "full_attention"
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "norm_topk_prob True, and this base has False": ("qwen3_moe", {"norm_topk_prob": False}),
    "norm_topk_prob False, and this base has True": ("olmoe", {"norm_topk_prob": True}),
    "some layers of this model are dense": ("qwen3_moe", {"mlp_only_layers": [0]}),
    "does not clip q, k and v, and this base has clip_qkv 8": ("olmoe", {"clip_qkv": 8.0}),
    "as many heads as queries, 4, and this base has 2": ("olmoe", {"num_key_value_heads": 2}),
    "among those of some groups": ("glm4_moe", {"n_group": 2}),
    "query_pre_attn_scalar 32": ("gemma2", {"query_pre_attn_scalar": 32}),
    "with silu, and this base has gelu": ("mixtral", {"hidden_act": "gelu"}),
    "full attention in every layer 2": ("gemma2", {"layer_types": [FULL] * 2}),
    "full attention in every layer 4": ("cohere2", {"layer_types": [FULL] * 4}),
    "gpt_oss with swiglu_limit 7.0, and this base has 5.0": ("gpt_oss", {"swiglu_limit": 5.0}),
    "without rotary embeddings in every fourth": ("smollm3", {"no_rope_layers": [1, 1, 1, 1]}),
    "Llama 4 with attention_chunk_size 8192": ("llama4_text", {"attention_chunk_size": 16}),
    r"experts in layers \[1, 3\], and this base": ("llama4_text", {"moe_layers": [0]}),
    "causal attention": ("gemma", {"use_bidirectional_attention": True}),
    "rope_interleave false": ("deepseek_v3", {"rope_interleave": False}),
    "models of 26 and 27 layers alone": ("deepseek_v2", {"q_lora_rank": None}),
    "this base by group_limited_greedy": ("deepseek_v2", {"topk_method": "group_limited_greedy"}),
    "qk_layernorm False, and this base has True": ("stablelm", {"qk_layernorm": True}),
    "a rotary base of 10000 in windows": (
        "gemma3_text",
        {"rope_parameters": {"sliding_attention": {"rope_theta": 5.0}}},
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_other_settings_are_named(message: str) -> None:
    family, changes = REFUSED[message]
    config = config_of_family(family)
    for key, value in changes.items():
        setattr(config, key, value)
    reason = find_family_obstacle(config)
    assert reason is not None and re.search(message, reason), reason


@pytest.mark.parametrize(("family", "key"), [("cohere2", "logit_scale"), ("gemma2", "final_logit")])
def test_logits_of_a_model_with_towers_are_not_scaled(family: str, key: str) -> None:
    """Aya Vision: its code leaves out the factor of its text model."""
    config = config_of_family(family)
    assert find_family_obstacle(config) is None
    assert f"without {key}" in str(find_family_obstacle(config, has_towers=True))
    assert find_family_obstacle(config_of_family("llama"), has_towers=True) is None


def test_window_is_that_of_a_layer_that_has_one() -> None:
    assert find_window(config_of_family("gemma2")) == 8
    assert find_window(config_of_family("llama")) is None
    config = config_of_family("qwen2")
    config.sliding_window, config.layer_types = 8, [FULL] * 2
    assert find_window(config) is None
    config.layer_types = [FULL, "sliding_attention"]
    assert find_window(config) == 8
    config = config_of_family("mistral")
    config.sliding_window = 8
    assert find_window(config) == 8
