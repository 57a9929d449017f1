"""Sizes in a base's ``config.json`` that no model has, and a tokenizer that is another model's.

With a size of 0 or of 10**9 layers ``transformers`` divides by zero, asks for absurd memory, or
does not end; its errors name no key.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from dist_peft.core.errors import UserError

__all__ = ["list_layer_values", "refuse_foreign_tokenizer", "refuse_impossible_sizes"]

_LIMITS = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "vocab_size"), 2**31),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "head_dim"), 2**31),
    **dict.fromkeys(("num_key_value_heads", "intermediate_size", "qk_nope_head_dim"), 2**31),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), 2**20),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 10_000),
}
"""Sizes of a model by key of its configuration, and the first that no model has."""


def refuse_impossible_sizes(config: PretrainedConfig | Mapping[str, Any], file: Path) -> None:
    """Refuse sizes with which building the model fails obscurely, or does not end.

    Args:
        config: the configuration of ``transformers``, which has defaults for keys that are absent;
            or the contents of ``file``, since making a configuration of them may fail already.

    Raises:
        UserError: names the key.
    """
    for sizes in _list_texts(config):
        is_latent = any(sizes.get("qk_nope_head_dim", ()))  # whose head_dim is the rotary part
        for key, limit in _LIMITS.items():
            least = 0 if "experts" in key or (key == "head_dim" and is_latent) else 1
            for size in sizes.get(key, ()):
                if type(size) is int and not least <= size < limit:
                    raise UserError(
                        f"{file} says {key} {size}, which no model has; get the base again"
                    )


def _list_texts(
    config: PretrainedConfig | Mapping[str, Any],
) -> Iterator[Mapping[str, Sequence[object]]]:
    """Yield the values by key of each part of a configuration that describes the language model."""
    if isinstance(config, PretrainedConfig):
        text = config.get_text_config()
        yield {key: list_layer_values(text, key) for key in _LIMITS}
        return
    inner = config.get("text_config")
    for part in (config, inner if isinstance(inner, Mapping) else {}):
        yield {key: [part[key]] for key in _LIMITS if key in part}


def list_layer_values(config: PretrainedConfig, key: str) -> list[Any]:
    """Return the value of ``key``; of a family whose layers differ in it, that of each layer.

    ``transformers`` then refuses to read the one of the whole model (Gemma 4's ``head_dim``). A key
    that is absent has the value None.
    """
    try:
        return [getattr(config, key, None)]
    except RuntimeError:  # AmbiguousGlobalPerLayerAttributeError, which not every version has
        return [getattr(layer, key, None) for layer in config.per_layer_config]


def refuse_foreign_tokenizer(
    tokenizer: PreTrainedTokenizerBase, rows: int, directory: Path
) -> None:
    """Refuse a tokenizer whose own vocabulary has tokens without a row of the input embedding.

    Embeddings are often larger than vocabularies, up to a multiple of 64 or more. Added tokens may
    lie beyond (Gemma 3 has one for images beyond its text models' embeddings): they are refused
    where the data have one.

    Args:
        rows: of the input embedding.
        directory: of the base.

    Raises:
        UserError: names both sizes.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # of the base's own code; its tokens are compared in the data alone
        return
    own: dict[str, int] = backend.get_vocab(with_added_tokens=False)
    added = tokenizer.added_tokens_decoder
    beyond = {number: token for token, number in own.items() if number >= rows}
    beyond = {number: token for number, token in beyond.items() if number not in added}
    if beyond:
        largest = max(beyond)
        raise UserError(
            f"the tokenizer of {directory} has {len(own):,} tokens with ids up to {largest:,} "
            f"({beyond[largest]!r:.40}), and the base has embeddings for {rows:,} (vocab_size in "
            "config.json): they are of two models; get tokenizer.json and config.json of one"
        )
