"""Fingerprints of a tokenizer and of its chat template: equal where texts become equal tokens."""

import json

from dist_peft.core.agreement import digest_of
from dist_peft.data.chat import Tokenizer

__all__ = ["template_digest", "tokenizer_digest"]


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """32 hexadecimal digits, of the vocabulary, of all rules and of the special tokens.

    Not of where the tokenizer lies, nor of the settings of its last call.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = sorted(tokenizer.get_vocab().items()) if backend is None else _state(backend.to_str())
    return digest_of([state, tokenizer.special_tokens_map])[:32]


def template_digest(tokenizer: Tokenizer) -> str:
    """32 hexadecimal digits, of the template or of all named ones; "none" without any."""
    return digest_of(tokenizer.chat_template)[:32] if tokenizer.chat_template else "none"


def _state(text: str) -> object:
    state = json.loads(text)
    state.pop("truncation", None)
    state.pop("padding", None)
    return state
