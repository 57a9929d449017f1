"""Read a JSON list item by item, so that a file larger than the memory can be one."""

import json
from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["JsonListError", "iterate_json_list"]

_SPACE = " \t\n\r"
_AT_END = 16
"""An error so close to the end of the text may be due to the end, such as half an escape."""

_NUMBER_TAIL = 3


class JsonListError(ValueError):
    """The text is not a JSON list; the message is that of ``json``, with line and column."""


class _ListText:
    """The part of the text that was read and not consumed yet."""

    def __init__(self, text: str, read: Callable[[], str]) -> None:
        self._text, self._read = text, read
        self._position = 0
        self._decode = json.JSONDecoder().raw_decode
        self._chars = self._lines = self._column = 0  # of the consumed text

    def _read_more(self) -> bool:
        """Drop the consumed text and read; return False at the end of the file."""
        gone, rest = self._text[: self._position], self._text[self._position :]
        self._text, self._position = rest, 0
        breaks = gone.count("\n")
        self._lines += breaks
        self._column = len(gone) - gone.rfind("\n") - 1 + (0 if breaks else self._column)
        self._chars += len(gone)
        # twice as much each time: an item is parsed from its start again
        parts = [rest]
        while (part := self._read()) and sum(map(len, parts)) < 2 * len(rest):
            parts.append(part)
        self._text = "".join([*parts, part])
        return len(self._text) > len(rest)

    def peek_character(self) -> str:
        """Return the next character that is not white space, and stop at it; empty at the end."""
        while True:
            for position in range(self._position, len(self._text)):
                if self._text[position] not in _SPACE:
                    self._position = position
                    return self._text[position]
            self._position = len(self._text)
            if not self._read_more():
                return ""

    def skip_character(self) -> None:
        """Consume the character that was peeked at."""
        self._position += 1

    def take_item(self) -> tuple[Any, int]:
        """Return the next value and its number of characters."""
        while True:
            try:
                item, stop = self._decode(self._text, self._position)
            except json.JSONDecodeError as error:
                failure = self.make_error(error.msg, error.pos)
                cut = error.msg.startswith("Unterminated") or error.pos + _AT_END > len(self._text)
                if not (cut and self._read_more()):
                    raise failure from None
                continue
            size = stop - self._position
            # a number may continue, such as with e+9
            if stop + _NUMBER_TAIL > len(self._text) and self._read_more():
                continue
            self._position += size
            return item, size

    def make_error(self, message: str, position: int) -> JsonListError:
        before = self._text[:position]
        line = self._lines + before.count("\n") + 1
        column = position - before.rfind("\n") + (0 if "\n" in before else self._column)
        where = f"line {line} column {column} (char {self._chars + position})"
        return JsonListError(f"{message}: {where}")

    def make_error_here(self, message: str) -> JsonListError:
        return self.make_error(message, self._position)


def iterate_json_list(text: str, read: Callable[[], str]) -> Iterator[tuple[Any, int]]:
    """Yield the items of a JSON list, each with its number of characters.

    Args:
        text: the beginning of the list, not empty. read: returns more text; empty at the end.

    Raises:
        JsonListError: invalid text, after the items before it.
        RecursionError, ValueError: of ``json``, for too deep nesting and too long numbers.
    """
    rest = _ListText(text, read)
    if rest.peek_character() != "[":
        raise rest.make_error_here("Expecting '['")
    rest.skip_character()
    if rest.peek_character() != "]":
        while True:
            rest.peek_character()
            yield rest.take_item()
            separator = rest.peek_character()
            if separator == "]":
                break
            if separator != ",":
                raise rest.make_error_here("Expecting ',' delimiter")
            rest.skip_character()
    rest.skip_character()
    if rest.peek_character():
        raise rest.make_error_here("Extra data")
