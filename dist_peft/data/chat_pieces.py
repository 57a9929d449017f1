"""Locate the texts of a conversation in its rendering.

A mark is inserted in the middle of every text of a record (content, reasoning, names of called
tools), and the conversation is rendered with the marks. If the rendering without its marks equals
the one of the unmarked conversation, the marks' positions are those of the texts, and a missing
mark belongs to a text that the template drops.

The mark is in the middle because templates look at the ends of texts: they trim them, or check
whether a message starts with ``<tool_response>``.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dist_peft.data.chat_template import ChatTemplate, Messages, RenderError, Tools
from dist_peft.data.marks import MARK, make_mark, parse_mark_number

__all__ = [
    "TextPiece",
    "find_marked_tail",
    "find_text_pieces",
    "insert_marks",
    "locate_text_pieces",
]

_THINK_END = "</think>"
_REASONING = ("reasoning_content", "reasoning", "thinking")


@dataclass(frozen=True)
class TextPiece:
    """One text of a message.

    Attributes:
        number: number of its mark.
        message: index of the message, from 0.
        key: ``content``, ``<think>`` (in the content), ``tool_calls`` (the function name of one),
            or the name of a key that holds reasoning.
        call: index of the tool call.
        text: stripped of surrounding white space.
    """

    number: int
    message: int
    key: str
    text: str
    call: int = 0

    @property
    def middle_offset(self) -> int:
        """Number of characters of ``text`` before the mark."""
        return len(self.text) // 2


def find_text_pieces(messages: Messages) -> list[TextPiece]:
    """Return the texts of all messages, without those that are only white space."""
    found: list[tuple[int, str, str, int]] = []
    for index, message in enumerate(messages):
        for key in _REASONING:
            if isinstance(message.get(key), str):
                found.append((index, key, message[key], 0))
        content = message.get("content")
        if isinstance(content, str):
            thought, answer = _split_reasoning(message["role"], content)
            found += [(index, "<think>", thought, 0), (index, "content", answer, 0)]
        for number, function in enumerate(_list_called_functions(message)):
            if isinstance(function.get("name"), str):
                found.append((index, "tool_calls", function["name"], number))
    texts = [(index, key, text.strip(), call) for index, key, text, call in found if text.strip()]
    return [TextPiece(number, *piece) for number, piece in enumerate(texts)]


def _split_reasoning(role: str, content: str) -> tuple[str, str]:
    """Split content into the text inside ``<think>`` and the text after it."""
    if role != "assistant" or _THINK_END not in content:
        return "", content
    before, _, after = content.rpartition(_THINK_END)
    return before.rpartition("<think>")[2], after


def _list_called_functions(message: dict[str, Any]) -> list[dict[str, Any]]:
    calls = message.get("tool_calls")
    found = []
    for call in calls if isinstance(calls, list) else []:
        function = call.get("function", call) if isinstance(call, dict) else None
        found.append(function if isinstance(function, dict) else {})
    return found


def insert_marks(messages: Messages, pieces: Sequence[TextPiece]) -> list[dict[str, Any]]:
    """Return copies of the messages with the marks of ``pieces``; skip those of later messages."""
    made = [dict(message) for message in messages]
    for index in {piece.message for piece in pieces if piece.key == "tool_calls"}:
        if index < len(made):
            made[index]["tool_calls"] = copy.deepcopy(made[index]["tool_calls"])
    # from the end, so that the first position of a text that occurs twice does not shift
    for piece in reversed(pieces):
        if piece.message >= len(made):
            continue
        message = made[piece.message]
        if piece.key == "tool_calls":
            holder, key = _list_called_functions(message)[piece.call], "name"
        else:
            holder, key = message, "content" if piece.key == "<think>" else piece.key
        text = holder[key]
        start = text.rfind(piece.text) if piece.key == "content" else text.find(piece.text)
        middle = start + piece.middle_offset
        holder[key] = text[:middle] + make_mark(piece.number) + text[middle:]
    return made


def locate_text_pieces(
    chat: ChatTemplate,
    messages: Messages,
    tools: Tools | None,
    text: str,
    pieces: Sequence[TextPiece],
) -> dict[int, int] | None:
    """Map the number of each piece that the template writes to its middle's offset in ``text``.

    Args:
        text: the rendered conversation.

    Returns:
        None if the marks change the rendering.
    """
    try:
        marked = chat.render_text(insert_marks(messages, pieces), tools)
    except RenderError:
        return None
    if MARK.sub("", marked) != text:
        return None
    places: dict[int, int] = {}
    removed = 0
    for found in MARK.finditer(marked):
        places.setdefault(parse_mark_number(found), found.start() - removed)
        removed += len(found[0])
    return places


def find_marked_tail(
    chat: ChatTemplate,
    messages: Messages,
    tools: Tools | None,
    pieces: Sequence[TextPiece],
    number: int,
    *,
    prompt: bool,
) -> str | None:
    """Return the rendered text after mark ``number``, without marks; None if it is not written.

    Args:
        prompt: add the generation prompt.
    """
    try:
        marked = chat.render_text(insert_marks(messages, pieces), tools, prompt=prompt)
    except RenderError:
        return None
    _, found, tail = marked.partition(make_mark(number))
    return MARK.sub("", tail) if found else None
