"""Lengths at which a family computes otherwise, as its configuration names them.

Beyond such a length a layer sees a window or a chunk of a document, picks the tokens that it sees,
or turns and scales queries differently. The code that does so runs only in rows longer than that,
often thousands of tokens. ``shorten_switches`` makes a configuration with which it runs in rows of
a few dozen::

    sliding_window                       4096  ->  24
    original_max_position_embeddings     8192  ->  32, with max_position_embeddings 131072 -> 512
    hidden_size                          4096      as it was, like everything else
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["ConfigSwitch", "list_switches", "shorten_switches"]

_KEYS = (
    "attention_chunk_size",  # Llama 4
    "floor_scale",  # Llama 4: scales queries by their place
    "index_topk",  # DeepSeek's sparse attention: tokens that a query sees
    "keep_window_size",  # Doge: the same
    "local_attention",  # ModernBERT
    "log_scaling_n_floor",
    "sliding_window",
    "sliding_window_size",
    "window_size",  # GPT-Neo
)
_ORIGINAL, _MAXIMUM = "original_max_position_embeddings", "max_position_embeddings"
_SHORTEST, _STEP = 24, 8
"""New lengths; rows of two short documents must not reach the shortest."""


@dataclass(frozen=True)
class ConfigSwitch:
    """One length.

    Attributes:
        key: its name in the configuration.
        length: tokens; longer rows are computed otherwise.
        holder: the configuration or dictionary that has it.
    """

    key: str
    length: int
    holder: Any


def list_switches(config: Any) -> list[ConfigSwitch]:
    """Return the switches that a ``transformers`` configuration names, shortest first."""
    text = config.get_text_config()
    found = [
        ConfigSwitch(key, length, text)
        for key in _KEYS
        for length in _positive_lengths(getattr(text, key, None))
    ]
    for rope in _rope_parameters(text):
        kind = str(rope.get("rope_type", ""))
        if "dynamic" in kind or kind == "longrope" or rope.get("llama_4_scaling_beta"):
            original = _positive_lengths(rope.get(_ORIGINAL))
            found += [ConfigSwitch(_ORIGINAL, length, rope) for length in original]
            # Phi-3 has it twice
            key = _ORIGINAL if getattr(text, _ORIGINAL, None) else _MAXIMUM
            if key == _ORIGINAL or not original:
                lengths = _positive_lengths(getattr(text, key, None))
                found += [ConfigSwitch(key, length, text) for length in lengths]
    return sorted(found, key=lambda switch: switch.length)


def shorten_switches(config: Any, longest: int) -> tuple[Any, list[int]]:
    """Return a configuration whose switches of up to ``longest`` tokens are at few tokens.

    They keep their order. Dynamic and longrope angles keep the ratio of the longest to the original
    length, from which they are computed.

    Returns:
        The configuration, ``config`` being unchanged, and the new lengths, ascending.
    """
    short = copy.deepcopy(config)
    text = short.get_text_config()
    switches = [switch for switch in list_switches(short) if switch.length <= longest]
    lengths = sorted({switch.length for switch in switches})
    new = {length: min(length, _SHORTEST + _STEP * number) for number, length in enumerate(lengths)}
    maximum = getattr(text, _MAXIMUM, None)
    for switch in switches:
        _set_length(switch, new)
        if switch.key == _ORIGINAL and maximum:
            setattr(text, _MAXIMUM, max(1, maximum * new[switch.length] // switch.length))
    return short, sorted(new.values())


def _rope_parameters(text: Any) -> Iterator[dict[str, Any]]:
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    nested = [value for value in rope.values() if isinstance(value, dict)]
    yield from nested or [rope]


def _positive_lengths(value: Any) -> list[int]:
    values: Sequence[Any] = value if isinstance(value, (list, tuple)) else [value]
    return sorted({n for n in values if isinstance(n, int) and not isinstance(n, bool) and n > 0})


def _set_length(switch: ConfigSwitch, new: dict[int, int]) -> None:
    if isinstance(switch.holder, dict):
        switch.holder[switch.key] = new[switch.length]
        return
    old = getattr(switch.holder, switch.key)
    shortened = (
        new[switch.length]
        if isinstance(old, int)
        else type(old)(new[n] if n == switch.length else n for n in old)
    )
    setattr(switch.holder, switch.key, shortened)
