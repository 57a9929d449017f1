"""Tiny randomly initialized models of every supported family, saved as real directories."""

from pathlib import Path

import torch
import transformers as tf

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

CONFIGS: dict[str, tf.PretrainedConfig] = {
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
"""One configuration a family; sliding windows are short enough to matter."""


def save_model(
    config: tf.PretrainedConfig,
    directory: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
) -> tf.PreTrainedModel:
    """Save a random model whose norms and biases are random too, and return it in eval mode."""
    torch.manual_seed(seed)
    model = tf.AutoModelForCausalLM.from_config(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    return model
