"""``config.json`` as mlx-lm reads it, and the models that it has.

mlx-lm has a class of arguments for each model type, with the keys of transformers 4 and few
defaults. A file of ``transformers`` 5 has some of them under other names (``rope_parameters``,
``layer_types``), and leaves keys of the outer model out of the text model's configuration
(``tie_word_embeddings``), or the other way round (``vocab_size``). They are all written, next to
those of the base.
"""

from collections.abc import Mapping
from typing import Any

__all__ = ["find_mlx_obstacle", "make_mlx_keys"]

_TYPES = """
afmoe apertus bitnet cohere cohere2 deepseek_v2 deepseek_v3 deepseek_v32 dots1 ernie4_5
ernie4_5_moe exaone4 exaone_moe falcon_h1 falcon_mamba gemma gemma2 gemma3 gemma3_text gemma3n
gemma4 gemma4_text gemma4_unified glm glm4 glm4_moe glm4_moe_lite glm_moe_dsa gpt2 gpt_bigcode
gpt_neox gpt_oss gptj granite granitemoe granitemoehybrid helium hunyuan_v1_dense internlm3
iquestcoder jamba kimi_k2 kimi_k25 kimi_linear laguna lfm2 lfm2_moe llama llama4 llava
longcat_flash mamba mamba2 mellum mimo_v2_flash minicpm3 minimax minimax_m2 ministral3 mistral
mistral3 mistral4 mixtral muse_glimmer muse_spark nanochat nemotron nemotron_h olmo olmo2 olmo3
olmo_hybrid olmoe phi phi3 phimoe qwen2 qwen2_5_vl qwen2_moe qwen2_vl qwen3 qwen3_5 qwen3_5_moe
qwen3_moe qwen3_next qwen3_vl qwen3_vl_moe recurrent_gemma seed_oss smollm3 solar_open stablelm
starcoder2
"""
"""Model types of ``transformers`` that mlx-lm 0.32 loads, under their name or another. Its Llama 4
without towers has no experts."""

_NOT_THE_MODEL = ("_name_or_path", "architectures", "dtype", "transformers_version")
"""Keys that belong to a file."""

_Config = Mapping[str, Any]


def find_mlx_obstacle(config: Any, kind: str) -> str | None:
    """Return why mlx-lm does not compute with a model; None: it has its type, as far as known.

    Args:
        config: the configuration of ``transformers``.
        kind: the model's type in ``config.json``, which may be that of a model with towers.
    """
    text = config.get_text_config()
    if kind not in _TYPES.split():
        return f"mlx is written for the model types of mlx-lm 0.32, not for {kind}"
    if text.model_type == "gemma3_text" and _find_period(text.layer_types) is None:
        return (
            "mlx-lm has full attention in every n-th layer of Gemma 3, and layer_types of this "
            "base are others"
        )
    if text.model_type == "llama4_text" and text.num_experts_per_tok != 1:
        return (
            "mlx-lm has one expert for each token of Llama 4, and this base has "
            f"num_experts_per_tok {text.num_experts_per_tok}"
        )
    return None


def make_mlx_keys(config: Any, *, tied: bool) -> dict[str, Any]:
    """Return the configuration of a text model with the keys that mlx-lm reads.

    Args:
        config: the configuration of ``transformers``.
        tied: whether the head is the embedding.
    """
    known = {key: value for key, value in config.to_dict().items() if value is not None}
    for key in _NOT_THE_MODEL:
        known.pop(key, None)
    return {**known, **_make_other_keys(known), "tie_word_embeddings": tied}


def _make_other_keys(config: _Config) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if config.get("head_dim") is not None:
        found["head_dim"] = config["head_dim"]
    elif "num_attention_heads" in config:
        found["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
    rope = config.get("rope_parameters") or {}
    if "full_attention" in rope:
        local = rope.get("sliding_attention") or {}
        found["rope_local_base_freq"] = local.get("rope_theta", 10000.0)
        rope = rope["full_attention"]
    if (turned := rope.get("partial_rotary_factor")) is not None:
        found["partial_rotary_factor"] = turned
    if "rope_theta" in rope:
        found["rope_theta"] = rope["rope_theta"]
        scaled = rope.get("rope_type", "default") != "default"
        found["rope_scaling"] = (
            {k: v for k, v in rope.items() if k != "rope_theta"} if scaled else None
        )
    if (experts := config.get("num_local_experts", config.get("num_experts"))) is not None:
        found["num_experts"] = found["num_local_experts"] = experts
    kind = config["model_type"]
    if kind == "gemma3_text":
        found["sliding_window_pattern"] = _find_period(config["layer_types"])
    if kind == "qwen3_vl_moe_text":
        found["norm_topk_prob"] = True
    if kind == "kimi_linear":
        found |= _make_kimi_keys(config)
    if kind == "olmo_hybrid":
        found["rope_theta"] = rope.get("rope_theta")  # none: no positions
    return found


def _find_period(layer_types: list[str]) -> int | None:
    """Return n where every n-th layer, and no other, has full attention; None: there is none."""
    full = [kind == "full_attention" for kind in layer_types]
    period = full.index(True) + 1 if True in full else len(full) + 1
    expected = [(i + 1) % period == 0 for i in range(len(full))]
    return period if full == expected else None


def _make_kimi_keys(config: _Config) -> dict[str, Any]:
    """Numbers of layers begin at 1; the layers without positions are those of full attention."""
    kinds = config["layer_types"]
    numbers = {
        kind: [i + 1 for i, own in enumerate(kinds) if own == kind]
        for kind in ("linear_attention", "full_attention")
    }
    dense = config["mlp_layer_types"].index("sparse")
    return {
        "rope_theta": 10000.0,
        "mla_use_nope": True,
        "first_k_dense_replace": dense,
        "linear_attn_config": {
            "kda_layers": numbers["linear_attention"],
            "full_attn_layers": numbers["full_attention"],
            "num_heads": config["linear_num_heads"],
            "head_dim": config["linear_head_dim"],
            "short_conv_kernel_size": config["linear_conv_kernel_dim"],
        },
    }
