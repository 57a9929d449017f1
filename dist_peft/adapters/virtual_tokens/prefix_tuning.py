"""The adapter method ``prefix``: prefix-tuning (Li and Liang 2021).

In every layer ``P`` trained keys and values stand before those of the tokens, for all to see::

    layer l      keys     [k0 k1 ... | K x0  K x1 ...]        k, v [P, heads, head size]
                 values   [v0 v1 ... | V x0  V x1 ...]        heads: of the keys (grouped-query)

Trained directly, this is unstable (section 4.3 of the paper); so they are the output of an MLP,
which is dropped after training (``projection: true``)::

    E [P, d]   ->   W2 tanh(W1 E + b1) + b2   [P, layers * 2 * d]        d = heads * head size

The prefix enters through the model's cache of keys and values (``model.prefix_cache``), the tokens'
positions begin after it, and a packed row gets a mask that shows it to each document
(``model.attention_mask.build_prefix_mask``).
"""

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn

from dist_peft.adapters.virtual_tokens.encoder import (
    Drop,
    ParameterInit,
    PromptEncoder,
    apply_linear,
    init_linear_parameters,
    keep_all_values,
)
from dist_peft.adapters.virtual_tokens.format import read_kv_shape
from dist_peft.adapters.virtual_tokens.method import VirtualTokensAdapter, shift_positions
from dist_peft.core.config.run import PrefixConfig
from dist_peft.core.errors import UserError
from dist_peft.model.attention_mask import build_prefix_mask, is_packed_sequence
from dist_peft.model.document_attention import DOCUMENT_ATTENTION
from dist_peft.model.prefix_cache import KeysValues, PrefixCache, fill_cache_with_prefix
from dist_peft.model.sample_dropout import DropoutPosition

__all__ = ["PrefixAdapter", "PrefixEncoder"]

_OTHER_CACHES = ("kv_lora_rank", "global_head_dim", "per_layer_config", "num_kv_shared_layers")
"""Settings of models whose layers do not all keep keys and values of one shape."""


class PrefixEncoder(PromptEncoder):
    """Keys and values of every layer, through the MLP or directly; ``[P, layers * 2 * d]``.

    Args:
        base: the model's input embedding.
        width: ``d``.
        layers: of the model.
        config: settings of the encoder.
        position: see ``PromptEncoder``.
    """

    def __init__(
        self,
        base: nn.Module,
        width: int,
        layers: int,
        config: PrefixConfig,
        position: DropoutPosition,
    ) -> None:
        count, outputs = config.num_virtual_tokens, layers * 2 * width
        hidden = config.encoder_hidden_size or width
        self.projects = config.projection
        starts = {"embedding": ParameterInit((count, outputs))}
        if config.projection:
            starts = {
                "embedding": ParameterInit((count, width)),
                **init_linear_parameters("hidden", width, hidden),
                **init_linear_parameters("output", hidden, outputs),
            }
        super().__init__(base, starts, position, dropout=config.dropout, dropouts=1)

    def encode_prompt(
        self, parameters: Mapping[str, Tensor], drop: Drop = keep_all_values
    ) -> Tensor:
        prefix = parameters["embedding"]
        if self.projects:
            prefix = apply_linear(
                apply_linear(prefix, parameters, "hidden").tanh(), parameters, "output"
            )
        return drop(0, prefix)


class PrefixAdapter(VirtualTokensAdapter[PrefixConfig]):
    """Trainable keys and values in front of each document in every layer."""

    _cache: PrefixCache | None = None

    def _build_encoder(self, model: nn.Module) -> PromptEncoder:
        config = cast(Any, model).config
        text = config.get_text_config()
        settings = text.to_dict()
        if config._attn_implementation not in ("sdpa", "eager", DOCUMENT_ATTENTION):
            raise UserError(
                f"base.attention {config._attn_implementation} cannot be given the mask that a "
                "prefix needs; use sdpa or eager, or adapter.kind prompt or ptuning"
            )
        others = [name for name in _OTHER_CACHES if settings.get(name)]
        kinds = set(getattr(text, "layer_types", None) or ())
        others += sorted(kinds - {"full_attention", "sliding_attention"})
        if others:
            raise UserError(
                f"adapter.kind prefix needs layers that all keep keys and values of one shape, but "
                f"the base has {others[0]}; use adapter.kind prompt or ptuning"
            )
        self.heads, self.size = read_kv_shape(text)
        self.layers = int(text.num_hidden_layers)
        embedding = cast(Any, model).get_input_embeddings()
        width = self.heads * self.size
        return PrefixEncoder(embedding, width, self.layers, self.config, self.position)

    def _prepare_decoder_inputs(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        count = self.config.num_virtual_tokens
        cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
        positions = kwargs.get("position_ids")
        padding = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        changed = {**kwargs, **shift_positions(count, positions, padding)}
        if cache is None or not cache.get_seq_length():
            prefix = self._compute_prefix(kwargs["input_ids"].shape[0])
            if cache is not None:
                fill_cache_with_prefix(cache, prefix)
            else:
                self._cache = changed["past_key_values"] = PrefixCache(prefix)
        if padding is None:
            changed["attention_mask"] = self._build_prefix_mask(positions)
        return changed

    def _build_prefix_mask(self, positions: Tensor | None) -> Any:
        """None where the model's own mask, causal from the cache on, is right."""
        if positions is None or not is_packed_sequence(positions):
            return None
        model = cast(Any, self.model)
        dtype = self.encoder.base_dtype
        count = self.config.num_virtual_tokens
        return build_prefix_mask(model.config.get_text_config(), positions, count, dtype)

    def _compute_prefix(self, rows: int) -> KeysValues:
        """For each layer keys and values ``[rows, heads, P, head size]``."""
        dtype = self.encoder.base_dtype
        flat = self.encoder().to(dtype)
        parts = flat.view(-1, 2 * self.layers, self.heads, self.size).permute(1, 2, 0, 3)
        wide = parts.unsqueeze(1).expand(-1, rows, -1, -1, -1)
        return [(wide[2 * layer], wide[2 * layer + 1]) for layer in range(self.layers)]

    def _process_decoder_output(self, output: Any) -> None:
        if self._cache is not None:
            output.past_key_values = None  # the caller did not request a cache
            self._cache = None
