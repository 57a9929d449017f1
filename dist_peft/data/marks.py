"""Marks: unique texts that show where a template writes each text of a conversation.

A mark is a number in characters of Unicode's private use area, which no trimming, splitting or
JSON encoding of a template changes.
"""

import re

__all__ = [
    "MARK",
    "count_shared_prefix",
    "find_position_after_mark",
    "make_mark",
    "parse_mark_number",
]

_OPEN, _CLOSE, _ZERO = 0xE000, 0xE001, 0xE010

MARK = re.compile(f"{chr(_OPEN)}([{chr(_ZERO)}-{chr(_ZERO + 9)}]+){chr(_CLOSE)}")


def make_mark(number: int) -> str:
    """Return the mark of ``number`` (>= 0)."""
    digits = "".join(chr(_ZERO + int(digit)) for digit in str(number))
    return f"{chr(_OPEN)}{digits}{chr(_CLOSE)}"


def parse_mark_number(found: re.Match[str]) -> int:
    """Return the number of a mark that ``MARK`` matched."""
    return int("".join(str(ord(digit) - _ZERO) for digit in found[1]))


def find_position_after_mark(text: str, number: int) -> int | None:
    """Return the end of the last occurrence of mark ``number`` in ``text``; None if none."""
    found = text.rfind(make_mark(number))
    return None if found < 0 else found + len(make_mark(number))


def count_shared_prefix(first: str, second: str, tokens: re.Pattern[str]) -> int:
    """Return the length of the common prefix of two texts, never ending inside a token of either.

    ``<|end|>\\n<|user|>`` and ``<|end|>\\n<|endoftext|>`` share ``<|end|>\\n``, not ``<|``.

    Args:
        tokens: pattern of the tokenizer's added tokens.
    """
    shared = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        shared += 1
    for text in (first, second):
        for found in tokens.finditer(text):
            if found.start() < shared < found.end():
                shared = found.start()
    return shared
