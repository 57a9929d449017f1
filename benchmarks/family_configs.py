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
        "context_length moe_latent_size attention_hidden_size out_hidden_size adapter_out_dim"
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
_LISTS = {"deepstack_visual_indexes": [0], "fullatt_block_indexes": [1]}
_SIZES |= _LISTS
_MAY_BE_LISTS = {*_LISTS, "eos_token_id"}
_VQ = {"base_channels": 32, "embed_dim": 64, "latent_channels": 64, "num_embeddings": 8}
_AXES = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
_SAM = {"global_attn_indexes": [1], "downsample_channels": [64, 64], "output_channels": 64}
_NEEDED: dict[str, dict[str, Any]] = {
    "gemma4_assistant": {
        "text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
    },
}
"""Without which a type has no configuration."""

_ASSISTANT: dict[str, Any] = {
    "backbone_hidden_size": 64,
    "num_centroids": 4,
    "centroid_intermediate_top_k": 2,
    "text_config": {
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 0,
        "num_kv_shared_layers": 2,
    },
}


def _image_tokens(count: int) -> dict[str, int]:
    """Names of the codes of an image, as the vocabularies of Chameleon and Emu 3 have them."""
    return {f"IMGIMG{chr(65 + code)}Z": 210 + code for code in range(count)}


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

_CHUNKED = ["chunked_attention"] * 3 + ["full_attention"]
_WINDOWED = ["sliding_attention"] * 3 + ["full_attention"]
_LLAMA4 = {
    "num_hidden_layers": 4,
    "layer_types": _CHUNKED,
    "no_rope_layers": [1, 1, 1, 0],
    "moe_layers": [0, 1, 2, 3],
    "num_experts_per_tok": 1,
}
_GEMMA3 = {
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
    "query_pre_attn_scalar": 16,
}
_PER_TYPE: dict[str, dict[str, Any]] = {
    # settings of the published models, where they are not the defaults of a small one
    "mistral": {"sliding_window": None},
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3_text": _GEMMA3,
    "qwen3_moe": {"norm_topk_prob": True},
    "llama4_text": _LLAMA4,
    "smollm3": {
        "num_hidden_layers": 4,
        "no_rope_layers": [1, 1, 1, 0],
        "layer_types": ["full_attention"] * 4,
    },
    "olmoe": {"num_key_value_heads": 4},
    "cohere2": {"num_hidden_layers": 4, "layer_types": _WINDOWED},
    "olmo3": {"num_hidden_layers": 4, "layer_types": _WINDOWED},
    # transformers saves the convolution in three parts of one size
    "olmo_hybrid": {"linear_num_key_heads": 4},
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
    "dots3_note": {
        "vision_config": {"mlp_layer_types": ["dense", "sparse"], "adapter_in_dim": 64},
        "audio_config": {"adapter_input_size": 64},
    },
    "dots3_note_text": {"num_key_value_heads": 4},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 104, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "blt": {
        "encoder_config": {"hidden_size_global": 64},
        "decoder_config": {"hidden_size_global": 64},
        "encoder_hash_byte_group_vocab": 97,
    },
    "chameleon": {"vocabulary_map": {"<image>": 200, **_image_tokens(8)}, "vq_config": _VQ},
    "emu3": {"vocabulary_map": {"<image>": 200, **_image_tokens(8)}, "vq_config": _VQ},
    "ernie4_5_vl_moe_text": {
        "moe_intermediate_size": [32, 16],
        "rope_parameters": {**_AXES, "mrope_section": [3, 3, 2]},
    },
    "evolla": {"aligner_num_add_layers": 1, "resampler_depth": 1},
    "florence2": {
        "vision_config": {"depths": [1] * 4, "embed_dim": [16] * 4, "num_heads": [2] * 4}
        | {"num_groups": [2] * 4, "projection_dim": 64},
    },
    "fun_asr_nano": {
        "adaptor_config": {"intermediate_size": 16, "projector_hidden_size": 64},
        "audio_config": {"num_timestamp_prediction_layers": 1},
    },
    "gemma3n": {"vision_config": {"model_args": {"channel_multiplier": 0.125}}},
    "gemma4_assistant": _ASSISTANT,
    "gemma4_unified_assistant": _ASSISTANT,
    "glm5_next_text": {
        "num_key_value_heads": 4,
        "index_kpool": 2,
        "qk_rope_head_dim": 0,
        "mlp_layer_types": ["dense", "sparse"],
        "linear_head_dim": 16,
        "linear_num_heads": 4,
    },
    "inkling2": {"vision_config": {"text_hidden_size": 64, "projection_hidden_dim": 64}},
    "mistral4": {
        "head_dim": 32,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "max_position_embeddings": 64,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
            "partial_rotary_factor": 0.5,
        },
    },
    "molmo2": {
        "adapter_config": {"vision_feature_layer": [1, 0], "text_hidden_size": 64},
        "vision_config": {"image_size": [28, 28], "num_position_embeddings": 4},
    },
    "muse_spark": {
        "audio_config": {"hidden_sizes": [16] * 4, "depths": [1] * 4, "num_hidden_layers": 4},
        "projector_hidden_size": 64,
    },
    "muse_spark_text": {"moe_hidden_size": 64, "mlp_layer_types": ["sparse", "sparse"]},
    "nemotron_h_omni": {
        "vision_config": {"video_temporal_patch_size": 2},
        "vision_hidden_size": 64,
        "projector_hidden_size": 64,
    },
    "phi4_multimodal": {
        "audio_config": {
            "num_blocks": 2,
            "ext_pw_out_channel": 64,
            "depthwise_separable_out_channel": 64,
            "nemo_conv_channels": 64,
        },
    },
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 32},
    "step3p5": {
        "swiglu_limits": [None, 0.05],
        "layer_types": ["full_attention", "sliding_attention"],
        "mlp_layer_types": ["dense", "sparse"],
        "sliding_window": 8,
        "share_expert_dim": 32,
    },
    "t5gemma2": {"encoder": {"text_config": {"hidden_size": 64}}},
    "unlimited_ocr": {"vision_config": {"sam_config": _SAM}},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _AXES}},
    "deepseek_ocr2": {
        "vision_config": {"sam_config": _SAM},
        "text_config": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2}
        | {"n_group": 1, "topk_group": 1},
    },
    "diffusion_gemma": {
        "text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
        "canvas_length": 8,
    },
    "granite4_vision": {
        "downsample_rate": "4/8",
        "deepstack_layer_map": [[1, 0]],
        "spatial_target_layers": [1],
    },
    "kyutai_speech_to_text": {
        "num_codebooks": 4,
        "codebook_vocab_size": 33,
        "audio_pad_token_id": 300,
        "audio_bos_token_id": 32,
        "codec_config": {"upsample_groups": 64},
    },
    "nemo_speechlm": {
        "audio_config": {
            "asr_config": {"num_key_value_heads": 4},
            "diarization_config": {
                "audio_config": {"num_key_value_heads": 4},
                "head_config": {"audio_hidden_size": 64, "hidden_size": 64},
            },
        },
        "word_timestamp_config": {"blank_token_id": 262, "num_key_value_heads": 4},
    },
    "perception_lm": {
        "vision_config": {"architecture": "vit_pe_core_tiny_patch16_384"}
        | {"model_args": {"embed_dim": 64, "depth": 1, "num_heads": 4}},
    },
    "qwen2_5_omni": {"enable_audio_output": False},
    "qwen3_omni_moe": {"enable_audio_output": False},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 32,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "vibevoice_acoustic_tokenizer_encoder": {
        "num_filters": 4,
        "downsampling_ratios": [2, 2],
        "depths": [1, 1, 1],
    },
    "xmod": {"default_language": "en_XX"},
}
"""What a type needs in addition to the sizes."""


def small_config(kind: str) -> PretrainedConfig:
    """The default configuration of a type with small sizes, one layer or more of each kind."""
    known = CONFIG_MAPPING[kind]
    return known(**_small_tree(known(**_NEEDED.get(kind, {})), kind))


def _small_tree(default: PretrainedConfig, kind: str) -> dict[str, Any]:
    """Small values of a configuration and of each of its parts."""
    changes = _small(default, kind)
    for name in default.sub_configs:
        if isinstance(part := getattr(default, name, None), PretrainedConfig):
            changes[name] = {"model_type": part.model_type, **_small_tree(part, part.model_type)}
    return _merge(changes, _PER_TYPE.get(kind, {}))


def _merge(values: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    """``values`` with ``others``; those of parts are merged in turn, and rotary ones replaced."""
    merged = {**values, **others}
    for name in (values.keys() & others.keys()) - {"rope_parameters"}:
        if isinstance(values[name], dict) and isinstance(others[name], dict):
            merged[name] = _merge(values[name], others[name])
    return merged


def _small(default: PretrainedConfig, kind: str) -> dict[str, Any]:
    given = default.to_dict()
    always = ("head_dim", "num_key_value_heads")
    known = {k for k, v in given.items() if v is not None or k in always}
    sizes = _SIZES | (_WIDE if kind in _WIDE_TYPES.split() else {})
    changes = {
        k: v
        for k, v in sizes.items()
        if k in known and (k in _MAY_BE_LISTS or not isinstance(given[k], list | tuple))
    }
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
    return changes


def _has_rope_sections(config: PretrainedConfig) -> bool:
    """Whether a text model shares its rotary frequencies out among the axes of an image."""
    file = Path(inspect.getfile(type(config)))
    code = file.with_name(file.name.replace("configuration_", "modeling_"))
    known = "rope_parameters" in config.to_dict() and "num_key_value_heads" in config.to_dict()
    return known and code.is_file() and "mrope_section" in code.read_text()
