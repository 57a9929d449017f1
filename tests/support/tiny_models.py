"""Tiny randomly initialized models of every supported family, saved as real directories."""

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers as tf

from tests.support.saved_files import SavedFiles

_COMMON = {
    "hidden_size": 64,
    "intermediate_size": 104,  # no multiple of the block of 64
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 97,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {**_COMMON, "num_key_value_heads": 2, "head_dim": 16}


class Configurations(Mapping[str, tf.PretrainedConfig]):
    """Configurations by name; each access copies, since ``transformers`` writes into the one it is
    given (its type, its attention)."""

    def __init__(self, known: dict[str, tf.PretrainedConfig]) -> None:
        self._known = known

    def __getitem__(self, name: str) -> tf.PretrainedConfig:
        return copy.deepcopy(self._known[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)

    def __or__(self, other: Mapping[str, tf.PretrainedConfig]) -> dict[str, tf.PretrainedConfig]:
        return {**self, **other}


CONFIGS = Configurations(
    {
        "llama": tf.LlamaConfig(**_GROUPED, rope_scaling={"rope_type": "linear", "factor": 2.0}),
        "llama-tied-bias": tf.LlamaConfig(
            **_GROUPED, tie_word_embeddings=True, attention_bias=True, mlp_bias=True
        ),
        "mistral": tf.MistralConfig(**_GROUPED, sliding_window=8),
        "qwen2": tf.Qwen2Config(**_COMMON, num_key_value_heads=2),
        "qwen3": tf.Qwen3Config(**_GROUPED, tie_word_embeddings=True),
        "gemma": tf.GemmaConfig(**_GROUPED),
        "gemma2": tf.Gemma2Config(**_GROUPED, sliding_window=8),
        "gemma3": tf.Gemma3TextConfig(**_GROUPED, sliding_window=8),
        "phi": tf.PhiConfig(**_COMMON),
        "phi3": tf.Phi3Config(**_COMMON, num_key_value_heads=2),
        "gpt_neox": tf.GPTNeoXConfig(**_COMMON),
        "opt": tf.OPTConfig(
            **{k: v for k, v in _COMMON.items() if k != "intermediate_size"},
            ffn_dim=104,
            word_embed_proj_dim=64,
            dropout=0.1,
        ),
    }
)
"""One configuration a family; sliding windows are short enough to matter."""

_GPT = {"vocab_size": 97, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
TRANSPOSED = Configurations(
    {
        "gpt2": tf.GPT2Config(**_GPT, n_inner=104, bos_token_id=1, eos_token_id=2),
        "openai-gpt": tf.OpenAIGPTConfig(**_GPT),
    }
)
"""Families whose blocks are made of ``Conv1D``, weights ``[in, out]``."""

OUTER = Configurations(
    {
        "gemma3": tf.Gemma3Config(
            text_config={**_GROUPED, "sliding_window": 8},
            vision_config={
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
            },
            mm_tokens_per_image=4,
        ),
        "gemma3n": tf.Gemma3nTextConfig(
            **{**_GROUPED, "head_dim": 16},
            vocab_size_per_layer_input=97,
            hidden_size_per_layer_input=8,
            num_kv_shared_layers=0,
            laurel_rank=4,
            altup_num_inputs=2,
            layer_types=["full_attention", "full_attention"],
            activation_sparsity_pattern=[0.0, 0.0],
            sliding_window=8,
        ),
    }
)
"""Tied models with more outside of their blocks: a vision tower, per-layer embeddings."""

_TWO_MORE = {**_COMMON, "max_position_embeddings": 66}
ENCODERS = Configurations(
    {
        "bert": tf.BertConfig(**_COMMON),
        # positions are counted from the padding token's id on, which takes two places
        "roberta": tf.RobertaConfig(
            **{**_TWO_MORE, "pad_token_id": 1, "bos_token_id": 0}, type_vocab_size=1
        ),
        "modernbert": tf.ModernBertConfig(
            **_COMMON,
            local_attention=8,
            global_attn_every_n_layers=2,
            cls_token_id=1,
            sep_token_id=2,
        ),
    }
)
"""Encoders, for classification."""

_EXPERTS = {"num_experts_per_tok": 2, "output_router_logits": False}
MIXTURES = Configurations(
    {
        "mixtral": tf.MixtralConfig(**_GROUPED, **_EXPERTS, num_local_experts=4),
        "qwen2_moe": tf.Qwen2MoeConfig(
            **_COMMON,
            **_EXPERTS,
            num_key_value_heads=2,
            num_experts=5,
            moe_intermediate_size=40,
            shared_expert_intermediate_size=72,
        ),
        # its first layer is dense
        "qwen3_moe": tf.Qwen3MoeConfig(
            **_GROUPED, **_EXPERTS, num_experts=3, moe_intermediate_size=40, mlp_only_layers=[0]
        ),
    }
)
"""Mixtures of experts; numbers of rows that ranks do not share evenly."""


_VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "dbrx": (
        "DbrxConfig",
        {
            "d_model": 64,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 64,
            "vocab_size": 97,
            "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
            "ffn_config": {"ffn_hidden_size": 104, "moe_num_experts": 4, "moe_top_k": 2},
        },
    ),
    "jetmoe": (
        "JetMoeConfig",
        {
            **_COMMON,
            "num_key_value_heads": 2,
            "kv_channels": 16,
            "num_local_experts": 3,
            "num_experts_per_tok": 2,
        },
    ),
    "longcat_flash": (
        "LongcatFlashConfig",
        {
            **_COMMON,
            "num_layers": 2,
            "ffn_hidden_size": 96,
            "expert_ffn_hidden_size": 32,
            "n_routed_experts": 3,
            "zero_expert_num": 2,
            "moe_topk": 2,
            "q_lora_rank": 32,
            "kv_lora_rank": 32,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 16,
            "v_head_dim": 16,
            "head_dim": 16,
        },
    ),
    "inkling_text": (
        "InklingTextConfig",
        {
            **_GROUPED,
            "moe_intermediate_size": 32,
            "n_routed_experts": 3,
            "n_shared_experts": 2,
            "num_experts_per_tok": 2,
        },
    ),
}
_CONVERTED: dict[str, tuple[str, dict[str, Any]]] = {
    "minimax_m3_vl": (
        "MiniMaxM3VLConfig",
        {
            "text_config": {
                **_GROUPED,
                "model_type": "minimax_m3_vl_text",
                "dense_intermediate_size": 96,
                "shared_intermediate_size": 40,
                "num_local_experts": 3,
                "num_experts_per_tok": 2,
                "rotary_dim": 16,
                "index_n_heads": 2,
                "index_head_dim": 32,
                "mlp_layer_types": ["sparse", "sparse"],
                "layer_types": ["full_attention", "full_attention"],
            },
            "vision_config": {
                "model_type": "minimax_m3_vl_vision",
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
            },
        },
    ),
    "inkling2_text": (
        "Inkling2TextConfig",
        {
            "vocab_size": 97,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "layer_types": ["hybrid_sliding", "hybrid"],
            **{f"{kind}num_attention_heads": 4 for kind in ("", "swa_")},
            **{f"{kind}num_key_value_heads": 2 for kind in ("", "swa_")},
            **{f"{kind}head_dim": 16 for kind in ("", "swa_")},
            "moe_intermediate_size": 32,
            "n_routed_experts": 3,
            "num_experts_per_tok": 2,
            "unpadded_vocab_size": 97,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
    ),
}
CONVERTED = {
    name: getattr(tf, kind)(**settings)
    for name, (kind, settings) in _CONVERTED.items()
    if hasattr(tf, kind)
}
"""Families whose files have gate and up otherwise than the model, as far as they are known."""

VARIANTS = {
    name: getattr(tf, kind)(**settings)
    for name, (kind, settings) in _VARIANTS.items()
    if hasattr(tf, kind)
}
"""Mixtures of experts that compute in a way of their own, as far as they are known."""


def save_model(
    config: tf.PretrainedConfig,
    directory: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    auto: Any = tf.AutoModelForCausalLM,
) -> tf.PreTrainedModel:
    """Save a random model whose norms and biases are random too, and return it in eval mode.

    The same model is made once in a process: later calls copy it and its files.

    ``auto``: the kind of model, by its head.
    """
    settings = (type(config), config.to_json_string(), config._attn_implementation)
    key = (*settings, seed, dtype, max_shard_size, auto)
    if (saved := _saved.get(key)) is not None:
        files, model, random_state = saved
        files.write(directory)
        torch.set_rng_state(random_state)
        return copy.deepcopy(model)
    model = _make_model(copy.deepcopy(config), seed, dtype, auto)
    there = set(directory.iterdir()) if directory.is_dir() else set()
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    if not there and model.num_parameters() < 500_000:
        files = SavedFiles.read(directory)
        _saved[key] = files, copy.deepcopy(model), torch.get_rng_state()
    return model


_saved: dict[object, tuple[SavedFiles, tf.PreTrainedModel, torch.Tensor]] = {}
"""What ``save_model`` wrote and returned, and the state of random numbers after it."""


def _make_model(
    config: tf.PretrainedConfig, seed: int, dtype: torch.dtype, auto: Any
) -> tf.PreTrainedModel:
    torch.manual_seed(seed)
    model = auto.from_config(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


CONVOLUTIONS: dict[str, tf.PretrainedConfig] = {
    "lfm2": tf.Lfm2Config(**_GROUPED, layer_types=["conv", "full_attention"]),
    "qwen3_5_text": tf.Qwen3_5TextConfig(
        **_GROUPED,
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
    ),
    "falcon_h1": tf.FalconH1Config(
        **_GROUPED,
        mamba_n_heads=8,
        mamba_d_head=16,
        mamba_d_ssm=128,
        mamba_d_state=16,
        mamba_n_groups=1,
    ),
}
"""Families with a short convolution over the row, which no mask stops."""

_LINEAR_HEADS = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
_JOINED: dict[str, tuple[str, dict[str, Any]]] = {
    "olmo_hybrid": (
        "OlmoHybridConfig",
        {**_GROUPED, **_LINEAR_HEADS, "layer_types": ["linear_attention", "full_attention"]},
    ),
}
JOINED = {
    name: getattr(tf, kind)(**settings)
    for name, (kind, settings) in _JOINED.items()
    if hasattr(tf, kind)
}
"""Families of which the files have one weight in several tensors, as far as they are known."""

_VISION = {"hidden_size": 32, "intermediate_size": 48, "patch_size": 14}
_AXES = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
WRAPPERS = Configurations(
    {
        "qwen2_5_vl": tf.Qwen2_5_VLConfig(
            text_config={**_COMMON, "num_key_value_heads": 2, "rope_parameters": _AXES},
            vision_config={
                **_VISION,
                "depth": 4,
                "num_heads": 2,
                "out_hidden_size": 64,
                "fullatt_block_indexes": [1],
            },
        ),
        "mistral3": tf.Mistral3Config(
            text_config={**_GROUPED, "model_type": "mistral"},
            vision_config={
                **_VISION,
                "model_type": "pixtral",
                "num_hidden_layers": 4,
                "num_attention_heads": 2,
                "head_dim": 16,
                "image_size": 28,
            },
        ),
    }
)
"""Text models with towers of more layers than they have, which are no causal language models."""

TOWER_FIRST = Configurations(
    {
        "idefics3": tf.Idefics3Config(
            text_config={**_GROUPED, "model_type": "llama"},
            vision_config={
                **_VISION,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 28,
            },
            pad_token_id=0,
        ),
    }
)
"""Models whose first parameter is a tower's and whose code asks for ``self.device``."""
