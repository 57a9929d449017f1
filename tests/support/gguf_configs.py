"""Small configurations of every family that GGUF is written for, with the settings of llama.cpp."""

from typing import Any

import transformers as tf

from dist_peft.export.formats.gguf_families import FAMILIES
from tests.support.export_runs import VOCABULARY

__all__ = ["config_of_family"]

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "sliding_window": None,
}
_MIXTURE = {
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
_LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "head_dim": 16,
}
_WINDOWS = {"sliding_window": 8, "query_pre_attn_scalar": 16}
_CHUNKS = [*["chunked_attention"] * 3, "full_attention"]
_PER_FAMILY: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"norm_topk_prob": True},
    "qwen2_moe": {"shared_expert_intermediate_size": 32},
    "gemma2": _WINDOWS,
    "gemma3_text": {**_WINDOWS, "num_hidden_layers": 6, "rope_parameters": None},
    "gpt_oss": {"sliding_window": 8},
    "llama4_text": {
        "num_hidden_layers": 4,
        "layer_types": _CHUNKS,
        "intermediate_size_mlp": 96,
        "interleave_moe_layer_step": 2,
    },
    "smollm3": {"num_hidden_layers": 4},
    "granite": {"embedding_multiplier": 2.0, "attention_multiplier": 0.2, "logits_scaling": 3.0},
    "granitemoe": {"residual_multiplier": 0.5},
    "granitemoeshared": {"shared_intermediate_size": 32},
    "olmoe": {"num_key_value_heads": 4},
    "dots1": {"num_key_value_heads": 4},
    "olmo3": {"num_hidden_layers": 4, "sliding_window": 8},
    "cohere2": {"num_hidden_layers": 4, "sliding_window": 8},
    "glm4": {"rms_norm_eps": 1e-5},
    "deepseek_v2": _LATENT,
    "deepseek_v3": {**_LATENT, "n_group": 2, "routed_scaling_factor": 2.5},
}
_NO_HEAD_DIM = ("starcoder2", "phi", "stablelm", "olmo2", "olmoe", "cohere", "nemotron")


def config_of_family(family: str) -> tf.PretrainedConfig:
    """A configuration of a type in ``gguf_families.FAMILIES``."""
    known = tf.models.auto.configuration_auto.CONFIG_MAPPING[family]
    default = known().to_dict()
    wanted = {**_SIZES, "head_dim": 16, **_MIXTURE, **_PER_FAMILY.get(family, {})}
    required = {"head_dim", *_PER_FAMILY.get(family, {})} - (
        {"head_dim"} if family in _NO_HEAD_DIM else set()
    )
    settings = {key: value for key, value in wanted.items() if key in default or key in required}
    return known(**settings)


assert set(_PER_FAMILY) <= set(FAMILIES)
