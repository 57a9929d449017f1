"""The model types that GGUF is written for: architecture, metadata, and settings of the code.

llama.cpp computes an architecture by code of its own, and a file has only the settings that this
code reads. Others are constants there (which layers have a window, how the weights of chosen
experts are normalized): a base with other values is refused, with the setting.

Rotary embeddings turn adjacent pairs of a head's dimensions in one half of the architectures, and
its two halves in the others, and so do families of ``transformers``: where the two differ, rows of
q and k are reordered.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import gguf

__all__ = ["FAMILIES", "GgufFamily", "find_family_obstacle", "find_window"]

_Architecture = gguf.MODEL_ARCH
_Keys = Mapping[str, str]
_SIGMOID = gguf.ExpertGatingFuncType.SIGMOID


@dataclass(frozen=True)
class GgufFamily:
    """A model type of ``transformers`` in llama.cpp.

    Attributes:
        architecture: llama.cpp's.
        keys: attribute of the configuration -> method of ``gguf.GGUFWriter``, besides those of
            every model (``gguf_model``).
        constants: method -> value, of settings that ``transformers`` has in its code.
        alternates: rows of an expert's ``gate_proj`` are the even ones of the matrix of both, and
            those of ``up_proj`` the odd ones.
        reorders: rows of q and k change their order, from halves to pairs.
        shifts_norms: norms of ``transformers`` multiply by ``1 + weight``.
        has_windows: llama.cpp reads the sliding window.
        activation: how the name of the MLP's activation begins.
        obstacle: returns why llama.cpp computes a configuration in another way.
    """

    architecture: gguf.MODEL_ARCH
    keys: _Keys = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)
    alternates: bool = False
    reorders: bool = False
    shifts_norms: bool = False
    has_windows: bool = False
    activation: str = "silu"
    obstacle: Callable[[Any], str | None] = lambda config: None


def find_family_obstacle(config: Any, *, has_towers: bool = False) -> str | None:
    """Return why llama.cpp does not compute a text model as ``transformers`` does; None: it does.

    Args:
        config: of the text model, of a type in ``FAMILIES``.
        has_towers: it is a part of a model with towers.
    """
    family = FAMILIES[config.model_type]
    for key in _ON_LOGITS if has_towers else ():
        if (own := getattr(config, key, None)) not in (None, 1.0):
            return (
                f"transformers computes the logits without {key} in a model with towers, and "
                f"llama.cpp with that of this base, {own}"
            )
    if getattr(config, "use_bidirectional_attention", None):
        return "llama.cpp computes causal attention, and this base has use_bidirectional_attention"
    own = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", "silu")
    if not str(own).startswith(family.activation):
        known = family.activation
        return f"llama.cpp computes {config.model_type} with {known}, and this base has {own}"
    return family.obstacle(config)


_ON_LOGITS = ("logit_scale", "logits_scaling", "final_logit_softcapping")
"""Settings of a text model's head, which models with towers (Aya Vision) do not apply."""


def find_window(config: Any) -> int | None:
    """Return the sliding window that some layer of a text model has; None: all see everything."""
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if kinds is not None:
        return int(window) if window and "sliding_attention" in kinds else None
    return int(window) if window and getattr(config, "use_sliding_window", True) else None


# -- settings that llama.cpp has in its code -------------------------------------------------------


def _check_pattern(config: Any, period: int, *, full_first: bool = False) -> str | None:
    """Compare the layers with a window with those of llama.cpp: all but one of ``period``."""
    last = 0 if full_first else period - 1
    layers = range(config.num_hidden_layers)
    pattern = ["full_attention" if i % period == last else "sliding_attention" for i in layers]
    if list(config.layer_types) == pattern:
        return None
    return (
        f"llama.cpp computes {config.model_type} with full attention in every layer {period} alone"
    )


def _check_gemma(config: Any) -> str | None:
    kind, layers = config.model_type, config.num_hidden_layers
    if reason := _check_pattern(config, {"gemma2": 2, "gemma3_text": 6}[kind]):
        return reason
    local = config.rope_parameters.get("sliding_attention", {}).get("rope_theta", 10000.0)
    if local != 10000.0:
        return f"llama.cpp has a rotary base of 10000 in windows, and this base has {local:g}"
    largest = layers == {"gemma2": 46, "gemma3_text": 62}[kind]
    known = config.hidden_size // config.num_attention_heads if largest else config.head_dim
    if config.query_pre_attn_scalar == known:
        return None
    return (
        f"llama.cpp divides attention by the root of {known}, and this base has "
        f"query_pre_attn_scalar {config.query_pre_attn_scalar}"
    )


def _check_mixture(normalizes: bool | None = None) -> Callable[[Any], str | None]:
    """``normalizes``: whether llama.cpp divides the weights of the chosen experts by their sum;
    None: a key of the file says so."""

    def check(config: Any) -> str | None:
        sparse = getattr(config, "decoder_sparse_step", 1) == 1
        if not sparse or getattr(config, "mlp_only_layers", None):
            return "llama.cpp has experts in every layer, and some layers of this model are dense"
        own = bool(getattr(config, "norm_topk_prob", False))
        if normalizes is None or own == normalizes:
            return _check_routing(config)
        return (
            f"llama.cpp computes {config.model_type} as with norm_topk_prob {normalizes}, and "
            f"this base has {own}"
        )

    return check


def _check_routing(config: Any) -> str | None:
    if (getattr(config, "n_group", None) or 1) > 1 and config.model_type != "deepseek_v3":
        return "llama.cpp chooses among all experts, and this base among those of some groups"
    if getattr(config, "clip_qkv", None) is not None:
        return f"llama.cpp does not clip q, k and v, and this base has clip_qkv {config.clip_qkv}"
    return None


def _check_equal_heads(normalizes: bool | None) -> Callable[[Any], str | None]:
    """Of a mixture whose keys llama.cpp has with as many heads as queries."""

    def check(config: Any) -> str | None:
        queries, keys = config.num_attention_heads, config.num_key_value_heads
        if queries == keys:
            return _check_mixture(normalizes)(config)
        return (
            f"llama.cpp has keys of {config.model_type} with as many heads as queries, {queries}, "
            f"and this base has {keys}"
        )

    return check


def _check_latent(config: Any) -> str | None:
    if not getattr(config, "rope_interleave", True):
        return "llama.cpp turns pairs of dimensions, and this base has rope_interleave false"
    if config.q_lora_rank is None and config.num_hidden_layers not in (26, 27):
        return "llama.cpp has queries without q_lora_rank in models of 26 and 27 layers alone"
    if getattr(config, "topk_method", "greedy") != "greedy":
        return f"llama.cpp chooses experts greedily, and this base by {config.topk_method}"
    return _check_mixture()(config)


def _check_no_rope(config: Any) -> str | None:
    layers = range(config.num_hidden_layers)
    known = [int((i + 1) % 4 != 0) for i in layers]
    if list(config.no_rope_layers) == known:
        return None
    return (
        f"llama.cpp computes {config.model_type} without rotary embeddings in every fourth layer, "
        f"and this base has no_rope_layers {list(config.no_rope_layers)}"
    )


def _check_llama4(config: Any) -> str | None:
    if reason := _check_no_rope(config):
        return reason
    chunked = ["chunked_attention" if use else "full_attention" for use in config.no_rope_layers]
    known = {
        "attention_chunk_size": 8192,
        "floor_scale": 8192,
        "attn_scale": 0.1,
        "attn_temperature_tuning": True,
        "layer_types": chunked,
        "use_qk_norm": config.num_local_experts != 128,
    }
    for key, value in known.items():
        own = getattr(config, key)
        if own != value:
            return f"llama.cpp computes Llama 4 with {key} {value}, and this base has {own}"
    step = config.interleave_moe_layer_step
    layers = [i for i in range(config.num_hidden_layers) if (i + 1) % step == 0]
    if list(config.moe_layers) != layers:
        return f"llama.cpp has experts in layers {layers}, and this base in {config.moe_layers}"
    return None


def _check_period(period: int) -> Callable[[Any], str | None]:
    return lambda config: _check_pattern(config, period)


def _check_plain(**known: Any) -> Callable[[Any], str | None]:
    """Compare settings of which llama.cpp has one value."""

    def check(config: Any) -> str | None:
        for key, value in known.items():
            if (own := getattr(config, key, value)) != value:
                return (
                    f"llama.cpp computes {config.model_type} with {key} {value}, and this base "
                    f"has {own}"
                )
        return None

    return check


def _check_gpt_oss(config: Any) -> str | None:
    if reason := _check_pattern(config, 2):
        return reason
    return _check_plain(swiglu_alpha=1.702, swiglu_limit=7.0)(config)


# -- keys ------------------------------------------------------------------------------------------

_SCALES: _Keys = {
    "embedding_multiplier": "add_embedding_scale",
    "residual_multiplier": "add_residual_scale",
    "attention_multiplier": "add_attention_scale",
    "logits_scaling": "add_logit_scale",
}
_CAPS: _Keys = {
    "attn_logit_softcapping": "add_attn_logit_softcapping",
    "final_logit_softcapping": "add_final_logit_softcapping",
}
_CHOSEN: _Keys = {"num_experts_per_tok": "add_expert_used_count"}
_LOCAL: _Keys = {**_CHOSEN, "num_local_experts": "add_expert_count"}
_EXPERTS: _Keys = {
    **_CHOSEN,
    "num_experts": "add_expert_count",
    "moe_intermediate_size": "add_expert_feed_forward_length",
}
_ROUTED: _Keys = {
    **_CHOSEN,
    "n_routed_experts": "add_expert_count",
    "moe_intermediate_size": "add_expert_feed_forward_length",
    "n_shared_experts": "add_expert_shared_count",
    "first_k_dense_replace": "add_leading_dense_block_count",
    "routed_scaling_factor": "add_expert_weights_scale",
    "norm_topk_prob": "add_expert_weights_norm",
}
_LATENT: _Keys = {
    **_ROUTED,
    "q_lora_rank": "add_q_lora_rank",
    "kv_lora_rank": "add_kv_lora_rank",
}
_GROUPED: _Keys = {
    **_LATENT,
    "n_group": "add_expert_group_count",
    "topk_group": "add_expert_group_used_count",
}
_GATED_BY_SIGMOID = {"add_expert_gating_func": _SIGMOID}

FAMILIES: dict[str, GgufFamily] = {
    "llama": GgufFamily(_Architecture.LLAMA, reorders=True),
    "mistral": GgufFamily(_Architecture.LLAMA, reorders=True),
    "mixtral": GgufFamily(_Architecture.LLAMA, _LOCAL, reorders=True),
    "qwen2": GgufFamily(_Architecture.QWEN2),
    "qwen3": GgufFamily(_Architecture.QWEN3),
    "qwen2_moe": GgufFamily(
        _Architecture.QWEN2MOE,
        {**_EXPERTS, "shared_expert_intermediate_size": "add_expert_shared_feed_forward_length"},
        obstacle=_check_mixture(False),
    ),
    "qwen3_moe": GgufFamily(_Architecture.QWEN3MOE, _EXPERTS, obstacle=_check_mixture(True)),
    "gemma": GgufFamily(_Architecture.GEMMA, shifts_norms=True, activation="gelu"),
    "gemma2": GgufFamily(
        _Architecture.GEMMA2,
        _CAPS,
        shifts_norms=True,
        has_windows=True,
        activation="gelu",
        obstacle=_check_gemma,
    ),
    "gemma3_text": GgufFamily(
        _Architecture.GEMMA3,
        _CAPS,
        shifts_norms=True,
        has_windows=True,
        activation="gelu",
        obstacle=_check_gemma,
    ),
    "phi3": GgufFamily(_Architecture.PHI3, has_windows=True),
    "gpt_oss": GgufFamily(
        _Architecture.GPT_OSS,
        {**_LOCAL, "intermediate_size": "add_expert_feed_forward_length"},
        alternates=True,
        has_windows=True,
        obstacle=_check_gpt_oss,
    ),
    "llama4_text": GgufFamily(
        _Architecture.LLAMA4,
        {
            **_LOCAL,
            "intermediate_size": "add_expert_feed_forward_length",
            "intermediate_size_mlp": "add_feed_forward_length",
            "interleave_moe_layer_step": "add_interleave_moe_layer_step",
        },
        obstacle=_check_llama4,
    ),
    "smollm3": GgufFamily(_Architecture.SMOLLM3, reorders=True, obstacle=_check_no_rope),
    "arcee": GgufFamily(_Architecture.ARCEE, reorders=True, activation="relu2"),
    "granite": GgufFamily(_Architecture.GRANITE, _SCALES, reorders=True),
    "granitemoe": GgufFamily(_Architecture.GRANITE_MOE, {**_SCALES, **_LOCAL}, reorders=True),
    "granitemoeshared": GgufFamily(
        _Architecture.GRANITE_MOE,
        {
            **_SCALES,
            **_LOCAL,
            "shared_intermediate_size": "add_expert_shared_feed_forward_length",
        },
        reorders=True,
    ),
    "olmo2": GgufFamily(_Architecture.OLMO2),
    "olmoe": GgufFamily(
        _Architecture.OLMOE,
        {**_CHOSEN, "num_experts": "add_expert_count"},
        obstacle=_check_equal_heads(False),
    ),
    "cohere": GgufFamily(_Architecture.COMMAND_R, {"logit_scale": "add_logit_scale"}),
    "cohere2": GgufFamily(
        _Architecture.COHERE2,
        {"logit_scale": "add_logit_scale"},
        has_windows=True,
        obstacle=_check_period(4),
    ),
    "starcoder2": GgufFamily(_Architecture.STARCODER2, activation="gelu"),
    "seed_oss": GgufFamily(_Architecture.SEED_OSS),
    "ernie4_5": GgufFamily(_Architecture.ERNIE4_5),
    "glm4": GgufFamily(_Architecture.GLM4),
    "glm4_moe": GgufFamily(
        _Architecture.GLM4_MOE, _ROUTED, _GATED_BY_SIGMOID, obstacle=_check_mixture()
    ),
    "dots1": GgufFamily(
        _Architecture.DOTS1, _ROUTED, _GATED_BY_SIGMOID, obstacle=_check_equal_heads(None)
    ),
    "deepseek_v2": GgufFamily(_Architecture.DEEPSEEK2, _LATENT, obstacle=_check_latent),
    "hunyuan_v1_dense": GgufFamily(_Architecture.HUNYUAN_DENSE),
    "minimax_m2": GgufFamily(
        _Architecture.MINIMAXM2,
        {**_LOCAL, "intermediate_size": "add_expert_feed_forward_length"},
        _GATED_BY_SIGMOID,
    ),
    "olmo3": GgufFamily(_Architecture.OLMO2, has_windows=True, obstacle=_check_period(4)),
    "nemotron": GgufFamily(_Architecture.NEMOTRON, shifts_norms=True, activation="relu2"),
    "stablelm": GgufFamily(
        _Architecture.STABLELM,
        {"use_parallel_residual": "add_parallel_residual"},
        obstacle=_check_plain(qk_layernorm=False),
    ),
    "phi": GgufFamily(
        _Architecture.PHI2, activation="gelu", obstacle=_check_plain(qk_layernorm=False)
    ),
    "glm": GgufFamily(_Architecture.CHATGLM),
    "deepseek_v3": GgufFamily(
        _Architecture.DEEPSEEK2, _GROUPED, _GATED_BY_SIGMOID, obstacle=_check_latent
    ),
}
"""``transformers`` model type -> how llama.cpp has it."""
