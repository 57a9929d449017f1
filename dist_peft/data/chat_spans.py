"""Locate the assistant's turns in a rendered conversation.

A turn starts where the inference prompt ends and stops with the token that closes it::

    <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHello<|im_end|>\\n
                                                          ^^^^^^^^^^^^^^^

Both are found by comparing with shorter conversations, from a text in the middle on (see
``chat_pieces``), so that a template may write earlier turns differently in them:

- the start: the messages before the turn, with the generation prompt. After the text of the
  previous message, both have the token that closes that message and the header of the turn.
- the end: the messages up to the turn. After the turn's text, both have its closing token.
"""

import re
from dataclasses import dataclass
from itertools import pairwise

from dist_peft.data.chat_closing import TurnEnds
from dist_peft.data.chat_pieces import (
    TextPiece,
    find_marked_tail,
    find_text_pieces,
    locate_text_pieces,
)
from dist_peft.data.chat_template import ChatTemplate, Messages, RenderError, Tools
from dist_peft.data.marks import count_shared_prefix

__all__ = ["TurnFinder", "TurnSpan", "build_closing_pattern", "find_first_closing"]

_OPEN_TAG = re.compile(r"[<\[][^<>\[\]\s]*$")


@dataclass(frozen=True)
class TurnSpan:
    """Characters of one assistant message.

    Attributes:
        message: index of the message, from 0.
        start, stop: characters ``[start, stop)`` of the rendered conversation.
        closed: whether it ends with a token that ends generation.
    """

    message: int
    start: int
    stop: int
    closed: bool


def build_closing_pattern(chat: ChatTemplate, ends: TurnEnds) -> re.Pattern[str]:
    """Return a pattern of the tokens that close turns; if none is known, of any control token."""
    tokens = sorted(ends.tokens or chat.special_tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, tokens)) or r"(?!)")


def find_first_closing(text: str, closing: re.Pattern[str]) -> int | None:
    """Return the end of the first closing token in the run of closing tokens that ends ``text``.

    Phi-3 closes the last turn with ``<|end|>`` and then the conversation with ``<|endoftext|>``.
    """
    end = len(text)
    stop: int | None = None
    for found in reversed(list(closing.finditer(text))):
        if text[found.end() : end].strip():
            break
        stop, end = found.end(), found.start()
    return stop


class TurnFinder:
    """Find the turns of one conversation.

    Args:
        text: the rendered conversation.
        closing: from ``build_closing_pattern``.
        appended: appended to ``text`` in training.
    """

    def __init__(
        self,
        chat: ChatTemplate,
        messages: Messages,
        tools: Tools | None,
        text: str,
        closing: re.Pattern[str],
        appended: str = "",
    ) -> None:
        self._chat, self._messages, self._tools = chat, list(messages), tools
        self._text, self._closing = text + appended, closing
        self.pieces = find_text_pieces(messages)
        self._marked = self.pieces
        places = locate_text_pieces(chat, messages, tools, text, self._marked)
        if places is None:
            # templates depend on reasoning and tool names more often than on content
            self._marked = [piece for piece in self.pieces if piece.key == "content"]
            places = locate_text_pieces(chat, messages, tools, text, self._marked)
        self.places = places or {}
        self.is_exact = places is not None and len(self._marked) == len(self.pieces)

    def is_piece_written(self, piece: TextPiece) -> bool:
        """Return whether the template writes the text of ``piece``."""
        if self.is_exact:
            return piece.number in self.places
        return "".join(piece.text.split()) in "".join(self._text.split())

    def find_turn(self, index: int) -> TurnSpan | None:
        """Return the turn of message ``index``; None if it cannot be located."""
        own = self._list_written_pieces(index)
        if not own:
            return None
        first, last = own[0], own[-1]
        earlier = [p for p in self._marked if p.message < index and p.number in self.places]
        if any(self.places[piece.number] > self.places[first.number] for piece in earlier):
            return None
        start = self._find_start(index, first)
        # the start may be after the middle: the inference prompt may hold the text's first part
        end = self.places[first.number] + len(first.text) - first.middle_offset
        if start is None or start > end:
            return None
        stop, closed = self._find_stop(index, last)
        return TurnSpan(index, start, stop, closed)

    def split_at_eos(self, turn: TurnSpan) -> list[tuple[int, int]]:
        """``turn`` without headers behind an eos inside it.

        Generation has ended at eos, so what opens the next part is written by the inference side
        (DeepSeek-R1 writes calls and text of one message as two turns).
        """
        spans, start = [], turn.start
        own = self._list_written_pieces(turn.message)
        eos = self._chat.eos_token
        for before, piece in pairwise(own):
            told = self._find_content_start(piece)
            place = self.places[before.number]
            found = self._text.rfind(eos, place, told) if told and eos else -1
            if told is None or found < 0:
                continue
            behind = found + len(eos)
            tokens = [t.end() for t in self._chat.token_pattern.finditer(self._text, behind, told)]
            spans.append((start, behind))
            start = tokens[-1] if tokens else told
        return [*spans, (start, turn.stop)]

    def find_message(self, index: int) -> tuple[int, int] | None:
        """Return [start, stop) of message ``index`` of any role; None if it cannot be located.

        For an assistant message this is its turn, for others their text.
        """
        if self._messages[index]["role"] == "assistant":
            turn = self.find_turn(index)
            return None if turn is None else (turn.start, turn.stop)
        spans = []
        for piece in self.pieces:
            if piece.message != index:
                continue
            start = self.places.get(piece.number, -1) - piece.middle_offset
            if start < 0 or not self._text.startswith(piece.text, start):
                return None
            spans.append((start, start + len(piece.text)))
        return (min(spans)[0], max(spans)[1]) if spans else None

    def _list_written_pieces(self, index: int) -> list[TextPiece]:
        """Return the pieces of message ``index`` that are located, in the order of their places."""
        found = [p for p in self._marked if p.message == index and p.number in self.places]
        return sorted(found, key=lambda piece: self.places[piece.number])

    # -- start of a turn ---------------------------------------------------------------------

    def _find_start(self, index: int, first: TextPiece) -> int | None:
        for before in range(index - 1, -1, -1):
            if written := self._list_written_pieces(before):
                start = self._find_start_after_anchor(index, written[-1], first)
                if start is not None:
                    return start
                break
        return self._find_start_after_question(index, first)

    def _find_start_after_anchor(
        self, index: int, anchor: TextPiece, first: TextPiece
    ) -> int | None:
        """Compare with the inference prompt, from ``anchor`` in an earlier message on."""
        earlier = self._messages[:index]
        tail = self._find_tail(earlier, anchor, prompt=True)
        place, limit = self.places[anchor.number], self.places[first.number]
        if tail is None or place > limit:
            return None
        told = self._find_content_start(first)
        whole = self._text[place:]
        if whole.startswith(tail):
            start = place + len(tail)
            gap = self._text[start:told] if told is not None else ""
            if (
                self._has_control_token(gap)
                and self._find_tail(earlier, anchor, prompt=False) == tail
            ):
                # a template without a generation prompt: the model does not generate the header
                return told
            return start
        # the turn does not start with the whole generation prompt, such as an opened <think>
        shared = count_shared_prefix(whole, tail, self._chat.token_pattern)
        if tag := _OPEN_TAG.search(whole[:shared]):
            shared = tag.start()
        closed = self._find_tail(earlier, anchor, prompt=False)
        if closed is None or shared < count_shared_prefix(closed, tail, self._chat.token_pattern):
            return told
        start = place + shared
        return start if told is None else min(start, told)

    def _find_start_after_question(self, index: int, first: TextPiece) -> int | None:
        """Find the start in a longer conversation, with a user message before the turn."""
        told = self._find_content_start(first)
        question = {"role": "user", "content": "question"}
        longer = [*self._messages[:index], question, *self._messages[index:]]
        if index and self._messages[index - 1]["role"] == "user":
            return told
        try:
            text = self._chat.render_text(longer, self._tools)
        except RenderError:
            return told
        inner = TurnFinder(self._chat, longer, self._tools, text, self._closing)
        own, asked = inner._list_written_pieces(index + 1), inner._list_written_pieces(index)
        if not own or not asked:
            return told
        start = inner._find_start_after_anchor(index + 1, asked[-1], own[0])
        if start is None:
            return told
        length = inner.places[own[0].number] - start
        place = self.places[first.number]
        same = self._text[place - length : place] == text[start : start + length]
        return place - length if same and 0 <= length <= place else told

    def _find_content_start(self, first: TextPiece) -> int | None:
        """Return the start of the content, if it is the first text of the turn."""
        start = self.places[first.number] - first.middle_offset
        same = self._text[start : start + first.middle_offset] == first.text[: first.middle_offset]
        return start if same and first.key == "content" else None

    def _has_control_token(self, text: str) -> bool:
        found = self._chat.token_pattern.finditer(text)
        return any(token[0] in self._chat.special_tokens for token in found)

    # -- end of a turn -----------------------------------------------------------------------

    def _find_stop(self, index: int, last: TextPiece) -> tuple[int, bool]:
        """Return the end of the turn, and whether a closing token is there."""
        place = self.places[last.number]
        behind = self._text[place:]
        shared = len(behind)
        if index < len(self._messages) - 1:
            alone = self._find_tail(self._messages[: index + 1], last, prompt=False)
            limit = self._find_next_place(index) - place
            shared = min(limit, count_shared_prefix(behind, alone or "", self._chat.token_pattern))
            if alone is None:
                found = self._closing.search(behind, 0, limit)
                shared = found.end() if found else limit
        stop = find_first_closing(behind[:shared], self._closing)
        if stop is not None:
            return place + stop, True
        # the marker of the next role, or a token that closes a turn only inside a conversation
        space = len(behind[shared:]) - len(behind[shared:].lstrip())
        if found := self._closing.match(behind, shared + space):
            return place + found.end(), True
        return place + shared, False

    def _find_next_place(self, index: int) -> int:
        later = [
            self.places[piece.number]
            for piece in self._marked
            if piece.message > index and piece.number in self.places
        ]
        after = [
            place
            for place in later
            if place >= self.places[self._list_written_pieces(index)[-1].number]
        ]
        return min(after, default=len(self._text))

    def _find_tail(self, messages: Messages, anchor: TextPiece, *, prompt: bool) -> str | None:
        return find_marked_tail(
            self._chat, messages, self._tools, self._marked, anchor.number, prompt=prompt
        )
