"""Map a model's configuration and tensor names to GGUF, per architecture.

llama.cpp applies rotary embeddings to adjacent pairs of a head's dimensions, ``transformers`` to
its two halves. For architectures whose llama.cpp graph does the former, rows of q and k are
interleaved within each head::

    transformers   row  h, (half, i)        llama.cpp   row  h, (i, half)

which moves whole rows and does not change their quantization groups.

A projection of all experts of a layer is one tensor ``[experts, out, in]``, such as
``blk.0.ffn_gate_exps.weight``; routers are in float32. Gemma's norms multiply by ``1 + w``, of
which the file has the sum. Of a model with towers the text model is written.
"""

import math
from typing import Any

import gguf
import torch
from torch import Tensor, nn

from dist_peft.core.errors import UserError
from dist_peft.export.base_weights import BaseWeight
from dist_peft.export.formats.expert_layout import ExpertLayout
from dist_peft.model.skeleton import Skeleton
from dist_peft.model.text_model import find_text_model

__all__ = ["GgufModelLayout"]

_ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "gemma": gguf.MODEL_ARCH.GEMMA,
    "gemma2": gguf.MODEL_ARCH.GEMMA2,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
    "phi3": gguf.MODEL_ARCH.PHI3,
    "mixtral": gguf.MODEL_ARCH.LLAMA,
    "qwen2_moe": gguf.MODEL_ARCH.QWEN2MOE,
    "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE,
}
"""``transformers`` model type -> architecture."""


_COUNTS = {
    "num_experts_per_tok": "add_expert_used_count",
    "num_experts": "add_expert_count",
    "moe_intermediate_size": "add_expert_feed_forward_length",
}
_MOE_KEYS: dict[str, dict[str, str]] = {
    "mixtral": {
        "num_experts_per_tok": "add_expert_used_count",
        "num_local_experts": "add_expert_count",
    },
    "qwen3_moe": _COUNTS,
    "qwen2_moe": {
        **_COUNTS,
        "shared_expert_intermediate_size": "add_expert_shared_feed_forward_length",
    },
}
"""Keys of mixtures, and the methods of the writer that add them."""


_ATTENTION_KEYS = {
    "sliding_window": "add_sliding_window",
    "attn_logit_softcapping": "add_attn_logit_softcapping",
    "final_logit_softcapping": "add_final_logit_softcapping",
}
_WINDOWED = ("gemma2", "gemma3_text", "phi3")
"""Model types whose attention keys llama.cpp reads."""


def _list_keys(config: Any) -> tuple[str, ...]:
    """Return the keys of ``config`` that are written besides those of every model."""
    own = _MOE_KEYS.get(config.model_type, {})
    return (*own, *(_ATTENTION_KEYS if config.model_type in _WINDOWED else ()))


def _find_activation_obstacle(config: Any) -> str | None:
    """Return the reason for which llama.cpp gates in another way; None: it does not."""
    own = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", "silu")
    known = "gelu" if config.model_type.startswith("gemma") else "silu"
    if str(own).startswith(known):
        return None
    return f"llama.cpp computes {config.model_type} with {known}, and this base has {own}"


def _find_gemma_obstacle(config: Any) -> str | None:
    """Return the reason for which llama.cpp computes a Gemma in another way: it knows the window's
    pattern, the local rotary base and the factor of attention from the architecture alone."""
    kind = config.model_type
    if kind not in ("gemma2", "gemma3_text"):
        return None
    period, layers = {"gemma2": 2, "gemma3_text": 6}[kind], config.num_hidden_layers
    pattern = [
        "full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(layers)
    ]
    if list(config.layer_types) != pattern:
        return f"llama.cpp computes {kind} with full attention in every layer {period} alone"
    local = config.rope_parameters.get("sliding_attention", {}).get("rope_theta", 10000.0)
    if local != 10000.0:
        return f"llama.cpp has a rotary base of 10000 in windows, and this base has {local:g}"
    largest = layers == {"gemma2": 46, "gemma3_text": 62}[kind]
    known = config.hidden_size // config.num_attention_heads if largest else config.head_dim
    if config.query_pre_attn_scalar != known:
        return (
            f"llama.cpp divides attention by the root of {known}, and this base has "
            f"query_pre_attn_scalar {config.query_pre_attn_scalar}"
        )
    return None


_NORMALIZED = {"qwen3_moe": True, "qwen2_moe": False}
"""Whether llama.cpp divides the weights of the chosen experts by their sum; there is no key."""


def _find_mixture_obstacle(config: Any) -> str | None:
    """Return the reason for which llama.cpp computes a mixture in another way; None: it does not,
    or the model is none."""
    kind = config.model_type
    if kind not in _MOE_KEYS:
        return None
    if getattr(config, "decoder_sparse_step", 1) != 1 or getattr(config, "mlp_only_layers", None):
        return "llama.cpp has experts in every layer, and some layers of this model are dense"
    normalizes = getattr(config, "norm_topk_prob", False)
    if kind in _NORMALIZED and bool(normalizes) != _NORMALIZED[kind]:
        return (
            f"llama.cpp computes {kind} as with norm_topk_prob {_NORMALIZED[kind]}, and this base "
            f"has {normalizes}"
        )
    return None


def _find_text_prefix(model: nn.Module) -> str:
    """Return the path of the text model in one with towers, and a dot; empty: it has none."""
    text = find_text_model(model)
    paths = {id(module): path for path, module in model.named_modules()}
    return "" if text is model else f"{paths[id(text)]}."


class GgufModelLayout:
    """Tensor names, metadata and row order of one model.

    Raises:
        UserError: an unsupported architecture or rotary scaling.
    """

    def __init__(self, skeleton: Skeleton) -> None:
        config = skeleton.model_config.get_text_config()
        if config.model_type not in _ARCHITECTURES:
            raise UserError(
                f"gguf is written for {', '.join(_ARCHITECTURES)}, not for {config.model_type}; "
                "merge the run (hf-bf16) and use llama.cpp's converter"
            )
        if reason := ExpertLayout().find_obstacle(skeleton.model):
            raise UserError(f"gguf is not written of these experts: {reason}")
        for find in (_find_activation_obstacle, _find_mixture_obstacle, _find_gemma_obstacle):
            if reason := find(config):
                raise UserError(f"gguf is not written: {reason}; merge the run (hf-bf16)")
        self.config: Any = config
        self.tied = skeleton.tied
        self._text = _find_text_prefix(skeleton.model)
        self.architecture = _ARCHITECTURES[config.model_type]
        self._names = gguf.get_tensor_name_map(self.architecture, config.num_hidden_layers)
        rope = getattr(config, "rope_parameters", None) or {}
        self._rope = dict(rope.get("full_attention", rope))
        kind = self._rope.get("rope_type", "default")
        if kind not in ("default", "linear", "llama3"):
            raise UserError(
                f"gguf is not written for rotary scaling {kind!r}; merge the run (hf-bf16) and use "
                "llama.cpp's converter"
            )

    @property
    def head_dim(self) -> int:
        """Size of an attention head."""
        own = getattr(self.config, "head_dim", None)
        return int(own or self.config.hidden_size // self.config.num_attention_heads)

    def map_tensor_name(self, weight: BaseWeight) -> str | None:
        """Return the GGUF name of a tensor; None if llama.cpp does not store it.

        Raises:
            UserError: the model needs the tensor, but GGUF has no name for it.
        """
        if self.tied and weight.path.startswith("lm_head."):
            return None
        path = weight.path
        if weight.is_expert:
            owner = weight.module_path.rpartition(".")[0]
            path = f"{owner}.{weight.find_expert()[1]}.weight"
        if self._text:
            if not path.startswith((self._text, "lm_head.")):
                return None  # a tower: llama.cpp has files of their own for these
            path = path.replace(self._text, "model.", 1)
        name = self.map_path(path)
        if name is None and not weight.path.endswith("rotary_emb.inv_freq"):
            raise UserError(
                f"gguf has no name for tensor {weight.name} of {self.architecture.name}"
            )
        return name

    def map_path(self, path: str) -> str | None:
        """Return the GGUF name of parameter ``path``, which ends in .weight or .bias, or None."""
        name: str | None = self._names.get_name(path, try_suffixes=(".weight", ".bias"))
        return name

    def get_row_multiple(self, weight: BaseWeight) -> int:
        """Return the number of rows that a chunk must be a multiple of to be reordered."""
        return self.head_dim if self._is_interleaved(weight.path) else 1

    def reorder_rows(self, weight: BaseWeight, rows: Tensor) -> Tensor:
        """Return rows of whole heads in llama.cpp's order."""
        return self.reorder_path_rows(weight.path, rows)

    def shift_rows(self, path: str, rows: Tensor) -> Tensor:
        """Return rows of the parameter ``path`` as the file has them: Gemma's norms plus one."""
        is_norm = self.config.model_type.startswith("gemma") and path.endswith("norm.weight")
        return rows + 1 if is_norm else rows

    def reorder_path_rows(self, path: str, rows: Tensor) -> Tensor:
        """Do the same for the parameter ``path``."""
        if not self._is_interleaved(path):
            return rows
        heads = rows.reshape(-1, 2, self.head_dim // 2, *rows.shape[1:])
        return heads.transpose(1, 2).reshape(rows.shape)

    def restore_path_rows(self, path: str, rows: Tensor) -> Tensor:
        """Return rows in llama.cpp's order in that of ``transformers``: ``reorder_path_rows``,
        reversed."""
        if not self._is_interleaved(path):
            return rows
        heads = rows.reshape(-1, self.head_dim // 2, 2, *rows.shape[1:])
        return heads.transpose(1, 2).reshape(rows.shape)

    def _is_interleaved(self, path: str) -> bool:
        if self.architecture != gguf.MODEL_ARCH.LLAMA:
            return False
        return path.split(".")[-2] in ("q_proj", "k_proj")

    def add_model_metadata(self, writer: gguf.GGUFWriter, name: str, file_type: int) -> None:
        """Add the hyperparameters of the model to a file's metadata."""
        config, heads = self.config, self.config.num_attention_heads
        writer.add_name(name)
        writer.add_file_type(file_type)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for key, add in {**_MOE_KEYS.get(config.model_type, {}), **_ATTENTION_KEYS}.items():
            if (value := getattr(config, key, None)) is not None and key in _list_keys(config):
                getattr(writer, add)(value)
        writer.add_vocab_size(config.vocab_size)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(heads)
        writer.add_head_count_kv(getattr(config, "num_key_value_heads", None) or heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(float(self._rope.get("rope_theta", 10000.0)))
        turned = float(self._rope.get("partial_rotary_factor", 1.0))
        writer.add_rope_dimension_count(int(self.head_dim * turned))
        writer.add_key_length(self.head_dim)
        writer.add_value_length(self.head_dim)
        if self._rope.get("rope_type") == "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(float(self._rope["factor"]))

    def compute_rope_factors(self) -> Tensor | None:
        """Return Llama 3's divisors of the rotary frequencies, float32 [head_dim / 2], or None.

        Frequencies with at least ``high_freq_factor`` periods in the original context are kept,
        those with at most ``low_freq_factor`` are divided by ``factor``, and those in between are
        interpolated.
        """
        if self._rope.get("rope_type") != "llama3":
            return None
        rope, theta = self._rope, float(self._rope["rope_theta"])
        factor, context = float(rope["factor"]), rope["original_max_position_embeddings"]
        low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
        factors = []
        for i in range(0, self.head_dim, 2):
            waves = context * theta ** (-i / self.head_dim) / (2 * math.pi)  # periods in context
            smooth = min(max((waves - low) / (high - low), 0.0), 1.0)
            factors.append(1 / ((1 - smooth) / factor + smooth))
        return torch.tensor(factors, dtype=torch.float32)
