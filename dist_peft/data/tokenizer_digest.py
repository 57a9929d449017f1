"""Fingerprints of a tokenizer and its chat template: equal if texts become the same tokens."""

import json

from dist_peft.core.agreement import hash_json_value
from dist_peft.data.chat import Tokenizer

__all__ = ["compute_template_digest", "compute_tokenizer_digest"]


def compute_tokenizer_digest(tokenizer: Tokenizer) -> str:
    """Return a hash, 32 hexadecimal digits, of the vocabulary, all rules and special tokens.

    The tokenizer's path and the settings of its last call are not included.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = (
        sorted(tokenizer.get_vocab().items())
        if backend is None
        else _parse_tokenizer_state(backend.to_str())
    )
    return hash_json_value([state, tokenizer.special_tokens_map])[:32]


def compute_template_digest(tokenizer: Tokenizer) -> str:
    """Return a hash, 32 hexadecimal digits, of all chat templates; "none" without any."""
    return hash_json_value(tokenizer.chat_template)[:32] if tokenizer.chat_template else "none"


def _parse_tokenizer_state(text: str) -> object:
    state = json.loads(text)
    state.pop("truncation", None)
    state.pop("padding", None)
    return state
