"""The hyperparameters of a model as metadata of a GGUF file, rotary embeddings included.

``linear`` divides positions by a factor; ``llama3`` divides frequencies, by factors that the file
has as a tensor; ``yarn`` (Peng et al. 2023) divides the low ones, which llama.cpp computes::

    f'_i = f_i * (1 - r_i) / factor + f_i * r_i        r_i: 1 up to dimension low, 0 from high on

llama.cpp rounds low and high to whole dimensions, as ``transformers`` does with ``truncate``.
gpt-oss is trained without rounding: there a file computes slightly other frequencies than the
model, by llama.cpp's own limit.
"""

import logging
import math
from typing import Any

import gguf
import torch
from torch import Tensor

from dist_peft.core.log import ONCE
from dist_peft.export.formats.gguf_families import FAMILIES, find_window

__all__ = ["add_model_metadata", "compute_rope_factors", "find_rope_obstacle", "get_head_dim"]

log = logging.getLogger("dist_peft")

_NORMS = ("rms_norm_eps", "layer_norm_eps", "norm_epsilon", "norm_eps")


def get_head_dim(config: Any) -> int:
    """Size of an attention head of queries and keys."""
    if has_latent_attention(config):
        return int(config.qk_nope_head_dim + config.qk_rope_head_dim)
    own = getattr(config, "head_dim", None)
    return int(own or config.hidden_size // config.num_attention_heads)


def get_rope(config: Any) -> dict[str, Any]:
    """Rotary parameters of layers without a window."""
    rope = getattr(config, "rope_parameters", None) or {}
    return dict(rope.get("full_attention", rope))


def find_rope_obstacle(config: Any) -> str | None:
    """Return why the rotary embeddings cannot be written; None: they can."""
    rope = get_rope(config)
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "linear", "llama3", "yarn"):
        return f"llama.cpp's files have no rotary scaling {kind!r}"
    if kind != "yarn":
        return None
    usual = 0.1 * math.log(rope["factor"]) + 1
    own = rope.get("attention_factor") or usual
    scale, of_all = rope.get("mscale"), rope.get("mscale_all_dim")
    known = scale == of_all and (of_all is not None) == has_latent_attention(config)
    if not known or abs(own - usual) > 1e-6:
        return "llama.cpp scales attention by another factor in its rotary scaling 'yarn'"
    return None


def has_latent_attention(config: Any) -> bool:
    """Whether keys and values are computed of a latent vector, as DeepSeek's are."""
    return bool(getattr(config, "kv_lora_rank", None))


def add_model_metadata(writer: gguf.GGUFWriter, config: Any, name: str, file_type: int) -> None:
    """Add the hyperparameters of a text model, of a type in ``FAMILIES``, to a file's metadata."""
    family, heads = FAMILIES[config.model_type], config.num_attention_heads
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, add in family.keys.items():
        if (value := getattr(config, key, None)) is not None:
            getattr(writer, add)(value)
    for add, value in family.constants.items():
        getattr(writer, add)(value)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(_get_context(writer, config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    if "add_feed_forward_length" not in family.keys.values():
        writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", None) or heads)
    eps = next(getattr(config, key) for key in _NORMS if hasattr(config, key))
    if hasattr(config, "rms_norm_eps"):
        writer.add_layer_norm_rms_eps(eps)
    else:
        writer.add_layer_norm_eps(eps)
    size = get_head_dim(config)
    writer.add_key_length(size)
    writer.add_value_length(getattr(config, "v_head_dim", None) or size)
    _add_rope(writer, config, size)


def _get_context(writer: gguf.GGUFWriter, config: Any) -> int:
    """Add the sliding window, and return the length of a context. An architecture that has no
    windows is the model's up to the length of one."""
    window, context = find_window(config), int(config.max_position_embeddings)
    if window is None:
        return context
    if FAMILIES[config.model_type].has_windows:
        writer.add_sliding_window(window)
        return context
    if window < context:
        log.warning(
            "llama.cpp computes %s without its sliding window of %d tokens: the file has a "
            "context_length of %d, up to which both are the same, in place of %d",
            config.model_type,
            window,
            window,
            context,
            extra=ONCE,
        )
    return min(window, context)


def _add_rope(writer: gguf.GGUFWriter, config: Any, head_dim: int) -> None:
    rope = get_rope(config)
    turned = getattr(config, "qk_rope_head_dim", None)
    if turned is None:
        turned = int(head_dim * float(rope.get("partial_rotary_factor", 1.0)))
    writer.add_rope_dimension_count(turned)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    kind = rope.get("rope_type", "default")
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    elif kind == "yarn":
        original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(float(rope["factor"]))
        writer.add_rope_scaling_orig_ctx_len(int(original))
        writer.add_rope_scaling_yarn_beta_fast(float(rope.get("beta_fast") or 32.0))
        writer.add_rope_scaling_yarn_beta_slow(float(rope.get("beta_slow") or 1.0))
        if of_all := rope.get("mscale_all_dim"):
            writer.add_rope_scaling_yarn_log_mul(0.1 * float(of_all))


def compute_rope_factors(config: Any) -> Tensor | None:
    """Return Llama 3's divisors of the rotary frequencies, float32 [head_dim / 2], or None.

    Frequencies with at least ``high_freq_factor`` periods in the original context are kept,
    those with at most ``low_freq_factor`` are divided by ``factor``, and those in between are
    interpolated.
    """
    rope, size = get_rope(config), get_head_dim(config)
    if rope.get("rope_type") != "llama3":
        return None
    theta = float(rope["rope_theta"])
    factor, context = float(rope["factor"]), rope["original_max_position_embeddings"]
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    factors = []
    for i in range(0, size, 2):
        waves = context * theta ** (-i / size) / (2 * math.pi)  # periods in context
        smooth = min(max((waves - low) / (high - low), 0.0), 1.0)
        factors.append(1 / ((1 - smooth) / factor + smooth))
    return torch.tensor(factors, dtype=torch.float32)
