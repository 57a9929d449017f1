"""Small configurations of every model type of the installed transformers, for ``families.py``.

A type's default configuration gets the sizes of ``SMALL`` wherever it has a value of that name, in
each of its parts (text, image, sound), and whatever ``_PER_TYPE`` says in addition.
"""

import inspect
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

__all__ = ["SMALL", "small_config"]

SMALL: dict[int, str] = {
    64: (
        "hidden_size d_model n_embd embed_dim embedding_size dim_model lru_width "
        "word_embed_proj_dim max_position_embeddings n_positions n_ctx max_seq_len seq_length "
        "context_length moe_latent_size attention_hidden_size out_hidden_size embed_dim"
    ),
    263: "vocab_size vocab_size_per_layer_input",
    96: (
        "intermediate_size ffn_dim ffn_hidden_size dim_ff n_inner decoder_ffn_dim encoder_ffn_dim "
        "d_ff d_inner dense_intermediate_size intermediate_size_mlp mlp_hidden_size"
    ),
    32: (
        "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size "
        "expert_ffn_hidden_size q_lora_rank kv_lora_rank o_lora_rank index_head_dim "
        "moe_shared_expert_intermediate_size mamba_dt_rank hidden_size_per_layer_input"
    ),
    16: (
        "head_dim global_head_dim qk_nope_head_dim qk_rope_head_dim v_head_dim linear_key_head_dim "
        "linear_value_head_dim mamba_d_head mamba_head_dim mamba_d_state state_size ssm_state_size "
        "kv_channels attention_head_dim chunk_size mamba_chunk_size d_kv laurel_rank rotary_dim"
    ),
    8: (
        "sliding_window window_size attention_window_size index_topk mamba_n_heads mamba_num_heads "
        "n_mamba_heads local_attention block_size"
    ),
    4: (
        "num_attention_heads n_head n_heads num_heads decoder_attention_heads "
        "encoder_attention_heads linear_num_value_heads num_experts num_local_experts "
        "n_routed_experts moe_num_experts o_groups"
    ),
    2: (
        "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers "
        "num_key_value_heads num_kv_heads linear_num_key_heads num_experts_per_tok moe_topk "
        "moe_k num_experts_per_token index_n_heads num_decoder_layers num_global_key_value_heads "
        "depth eos_token_id"
    ),
    1: (
        "n_group topk_group first_k_dense_replace n_shared_experts num_shared_experts "
        "mamba_n_groups n_groups mamba_ngroups num_mem_blocks "
        "bos_token_id"
    ),
    0: "pad_token_id num_kv_shared_layers",
}
_SIZES: dict[str, Any] = {name: size for size, names in SMALL.items() for name in names.split()}
_SIZES |= {"deepstack_visual_indexes": [0], "fullatt_block_indexes": [1]}
_WIDE_TYPES = """
bamba deepseek_v3 gemma3_text gemma4_text glm4_moe gpt_oss granitemoe kimi_linear llama
llama4_text mistral mixtral nemotron_h olmo_hybrid phi3 qwen2 qwen3 qwen3_moe qwen3_vl_moe_text
qwen3_vl_text
"""
"""Types, or those of their text models, of which every export is loaded."""

_WIDE: dict[str, Any] = dict.fromkeys(SMALL[96].split(), 128)
_WIDE |= dict.fromkeys(SMALL[32].split(), 64)
_WIDE |= {"qk_rope_head_dim": 32, "mamba_n_heads": 32, "mamba_num_heads": 32}
_WIDE |= {"mamba_d_head": 4, "mamba_head_dim": 4}
"""Sizes of these: kernels of bitsandbytes on a CPU want in_features that are multiples of 64 and
out_features that are multiples of 32."""

_PER_TYPE: dict[str, dict[str, Any]] = {
    "mamba2": {"head_dim": 16, "num_heads": 8},
    "falcon_h1": {"mamba_d_ssm": 128},
    "deepseek_v32": {"num_key_value_heads": 4, "n_routed_experts": 8, "index_head_dim": 32},
    "glm_moe_dsa": {"num_key_value_heads": 4, "n_routed_experts": 8, "index_head_dim": 32},
    "bamba": {"attn_layer_indices": [1]},
    "jamba": {"use_mamba_kernels": False, "num_hidden_layers": 8},
    "zamba": {
        "use_mamba_kernels": False,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "num_hidden_layers": 4,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
    "zaya": {"num_experts_per_tok": 1},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "xlm": {"emb_dim": 64, "n_words": 263},
    "zamba2": {
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "num_hidden_layers": 4,
        "num_key_value_heads": 4,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
    },
    "nemotron_h": {"layers_block_type": ["mamba", "attention"], "num_hidden_layers": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "phi3": {"rope_scaling": None},
    "xlstm": {"num_heads": 4},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "num_local_experts": 0},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "gemma3n_text": {"intermediate_size": [104] * 2},
    "lfm2": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "lfm2_moe": {
        "layer_types": ["conv", "full_attention"],
        "num_hidden_layers": 2,
        "num_dense_layers": 1,
    },
    "opt": {"dropout": 0.0},
    "longcat_flash": {"zero_expert_num": 2},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_key_value_heads": 4,
        "num_experts_per_tok": 2,
    },
    "bailing_hybrid": {"n_group": 1, "topk_group": 1, "num_experts": 8},
    "dots3_note": {"num_key_value_heads": 4},
    "dots3_note_text": {"num_key_value_heads": 4},
    "gemma4_assistant": {"hidden_size_per_layer_input": 0},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 104, "moe_num_experts": 4, "moe_top_k": 2},
    },
}
"""What a type needs in addition to the sizes."""


def small_config(kind: str) -> PretrainedConfig:
    """The default configuration of a type with small sizes, one layer or more of each kind."""
    known = CONFIG_MAPPING[kind]
    default = known()
    text = default.get_text_config()
    if text is default:
        return known(**_small(default, kind))
    parts = {name: getattr(default, name, None) for name in default.sub_configs}
    sizes = {n: _small(part, part.model_type) for n, part in parts.items() if part is not None}
    own = {k: v for k, v in _small(default, kind).items() if k not in sizes}
    return known(**{**own, **sizes, **_PER_TYPE.get(kind, {})})


def _small(default: PretrainedConfig, kind: str) -> dict[str, Any]:
    given = default.to_dict()
    always = ("head_dim", "num_key_value_heads")
    known = {k for k, v in given.items() if v is not None or k in always}
    sizes = _SIZES | (_WIDE if kind in _WIDE_TYPES.split() else {})
    changes = {k: v for k, v in sizes.items() if k in known}
    if given.get("head_dim") is not None and "qk_rope_head_dim" in given:
        changes["head_dim"] = changes["qk_rope_head_dim"]
    if "kv_lora_rank" in given and "num_key_value_heads" in given:  # multi-head latent attention
        changes["num_key_value_heads"] = changes["num_attention_heads"]
    if _has_rope_sections(default):
        usual = {"rope_type": "default", "rope_theta": 10000.0}
        rotary = usual | dict(given.get("rope_parameters") or {})
        size = changes.get("head_dim", changes["hidden_size"] // changes["num_attention_heads"])
        half = int(size * rotary.get("partial_rotary_factor", 1)) // 2
        sections = [half - 2 * (half * 3 // 8), half * 3 // 8, half * 3 // 8]
        changes["rope_parameters"] = {**rotary, "mrope_section": sections}
    pattern = given.get("layer_types")
    count = next((k for k in ("num_hidden_layers", "n_layer", "num_layers") if k in given), None)
    if pattern and count:
        kinds = list(dict.fromkeys(pattern))
        changes["layer_types"] = kinds if len(kinds) > 1 else kinds * 2
        changes[count] = len(changes["layer_types"])
    return changes | _PER_TYPE.get(kind, {})


def _has_rope_sections(config: PretrainedConfig) -> bool:
    """Whether a text model shares its rotary frequencies out among the axes of an image."""
    file = Path(inspect.getfile(type(config)))
    code = file.with_name(file.name.replace("configuration_", "modeling_"))
    known = "rope_parameters" in config.to_dict() and "num_key_value_heads" in config.to_dict()
    return known and code.is_file() and "mrope_section" in code.read_text()
