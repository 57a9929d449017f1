"""Render conversations to text and the character spans that contribute to the loss.

Only text that the model has to generate is trained on: the assistant's turns with the token that
ends them, not the header that the inference side writes (``<|im_start|>assistant``)::

    <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHello<|im_end|>\\n
                                                          ^^^^^^^^^^^^^^^

If a template marks these parts itself (``{% generation %}``), its marks are used, extended by the
closing token where they exclude it. For all others ``chat_spans`` finds the turns. Refused are
turns that cannot be located, turns that no token ends, a last turn whose text the template drops,
and roles that the template does not know.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from dist_peft.core.errors import UserError
from dist_peft.data.chat_closing import TurnEnds, find_turn_ends
from dist_peft.data.chat_pieces import TextPiece
from dist_peft.data.chat_spans import TurnFinder, build_closing_pattern, find_first_closing
from dist_peft.data.chat_template import (
    ChatTemplate,
    RenderError,
    Span,
    Tokenizer,
    make_default_chat_template,
)
from dist_peft.data.message_weights import (
    contributes_to_loss,
    is_excluded_from_loss,
    strip_weight_keys,
)
from dist_peft.data.tally import Tally
from dist_peft.data.tool_calls import check_tool_calls, render_tool_calls

__all__ = ["ChatRenderer", "RenderedChat", "Tokenizer", "make_default_chat_template"]

Messages = list[dict[str, Any]]
Tools = list[dict[str, Any]] | None

_MADE_UP = "unheardof"

_USUAL_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
"""Those that this project's template writes, and that need no word in others."""


@dataclass(frozen=True)
class RenderedChat:
    """A rendered conversation.

    Attributes:
        text: includes its special tokens.
        spans: [start, stop) of the characters that contribute to the loss.
    """

    text: str
    spans: tuple[Span, ...]


class ChatRenderer:
    """Render conversations with the tokenizer's chat template.

    Args:
        mark_assistant: find the assistant's spans; else the whole text is one span.
        starts_with_bos: whether documents of this tokenizer begin with bos; used only for a
            tokenizer without a template.
        turn_end: handling of a turn that no token ends: ``error`` or ``warn``.
        template_name: of the template in messages; by default that of the tokenizer.

    Attributes:
        user_notes: one-time warnings for the user.
        default_template: this project's template, if the tokenizer has none.

    Raises:
        UserError: the tokenizer's chat template is not text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        mark_assistant: bool,
        starts_with_bos: bool,
        turn_end: Literal["error", "warn"] = "error",
        template_name: str | None = None,
    ) -> None:
        self.mark_assistant = mark_assistant
        self._turn_end = turn_end
        self._chat = ChatTemplate(tokenizer, starts_with_bos=starts_with_bos, name=template_name)
        self._notes, self._counts = Tally(), Tally()
        self.begin_chunk()
        self.default_template: str | None = None
        if self._chat.is_default:
            self.default_template = self._chat.get_jinja_source()
            self._notes.count(
                "the tokenizer has no chat template: conversations are written as "
                "'<|role|>\\ncontent' with the eos token after assistant turns"
            )

    def begin_chunk(self) -> None:
        """Forget the roles seen so far: a check must not depend on where chunks are rendered."""
        self._known_roles = {"user", "assistant"}
        self._custom_roles: set[str] = set()

    @property
    def tallies(self) -> tuple[Tally, ...]:
        return (self._notes, self._counts)

    @property
    def user_notes(self) -> list[str]:
        notes = [note for note, *_ in self._notes.list_entries()]
        counts = self._counts.list_entries()
        return [*notes, *(f"{n} {what}; the first is {first}" for what, n, first in counts)]

    @cached_property
    def _turn_ends(self) -> TurnEnds:
        return find_turn_ends(self._chat)

    @cached_property
    def _closing_pattern(self) -> re.Pattern[str]:
        return build_closing_pattern(self._chat, self._turn_ends)

    def render_conversation(self, messages: Messages, tools: Tools, where: str) -> RenderedChat:
        """Return the conversation as text, and the characters that contribute to the loss.

        Args:
            where: names the record in messages.

        Raises:
            UserError: the template refuses the conversation, drops text to be trained on, does not
                know a role, rewrites earlier turns so that the assistant's part cannot be located,
                or ends a turn with no token.
        """
        places = [f"{where}, message {number}" for number in range(1, len(messages) + 1)]
        left_out = [
            is_excluded_from_loss(m, place) for m, place in zip(messages, places, strict=True)
        ]
        trained = [
            contributes_to_loss(message, place)
            if self.mark_assistant
            else message["role"] == "assistant" and not left_out[index]
            for index, (message, place) in enumerate(zip(messages, places, strict=True))
        ]
        check_tool_calls(messages, where)
        asked = strip_weight_keys(messages)
        written, tools, text, generated = self._write_template(asked, tools, where)
        appended = self._find_appended_marker(written[-1], text)
        finder = TurnFinder(self._chat, written, tools, text, self._closing_pattern, appended)
        self._check_roles(written, tools, text, finder, where)
        self._check_dropped_texts(written, trained, finder, where)
        text += appended
        if not self.mark_assistant:
            if trained[-1] and find_first_closing(text, self._closing_pattern) is None:
                self._report_missing_end(text, len(written) - 1, where)
            return RenderedChat(text, self._find_included_spans(left_out, finder, text, where))
        if generated is None:
            spans = self._find_trained_spans(written, trained, finder, text, where)
        else:
            spans = self._extend_marked_spans(generated, written, trained, finder, text, where)
        return RenderedChat(text, tuple(spans))

    def _write_template(
        self, messages: Messages, tools: Tools, where: str
    ) -> tuple[Messages, Tools, str, list[Span] | None]:
        """Return messages and tools in the template's form, the text, and its marked spans."""
        try:
            marks = self._chat.marks_assistant_text(tools) and self.mark_assistant
            if tools and "tools" not in self._chat.get_jinja_source(tools):
                self._notes.count(
                    "the chat template does not write tools: the records' tools are left out"
                )
            chosen, tools, text = render_tool_calls(self._chat, messages, tools)
            generated = self._chat.render_marked(chosen, tools)[1] if marks else None
            text.encode()
        except RenderError as error:
            raise UserError(
                f"{where}: {self._chat} cannot write this conversation: {error}"
            ) from None
        except UnicodeEncodeError:
            raise UserError(
                f"{where} is not valid Unicode: half a surrogate pair in tools or tool calls"
            ) from None
        return chosen, tools, text, generated

    def _find_appended_marker(self, last: dict[str, Any], text: str) -> str:
        """Return the next role's marker, for templates in which only that ends a turn."""
        if (
            last["role"] != "assistant"
            or find_first_closing(text, self._closing_pattern) is not None
        ):
            return ""
        ends = self._turn_ends
        return (ends.append_call if last.get("tool_calls") else ends.append) or ""

    # -- checks for dropped text -----------------------------------------------------------------

    def _check_roles(
        self, messages: Messages, tools: Tools, text: str, finder: TurnFinder, where: str
    ) -> None:
        for index, message in enumerate(messages):
            role, place = message["role"], f"{where}, message {index + 1}"
            if role in self._known_roles:
                self._count_custom_role(role, place)
                continue
            if self._chat.is_default and role not in _USUAL_ROLES:
                raise UserError(
                    f"{place}: the role {role} is unknown; known are {', '.join(_USUAL_ROLES)}. "
                    "Rename the role, remove such messages, or give the tokenizer a chat template "
                    "that has it"
                )
            said = [p for p in finder.pieces if p.message == index and p.key == "content"]
            if not said:
                continue
            dropped = not finder.is_piece_written(said[0])
            if dropped if role == "system" else not (dropped and role == "developer"):
                if self._is_unknown_role(role, messages, tools, text):
                    raise UserError(
                        f"{place}: {self._chat} does not know the role "
                        f"{role}, and {'leaves it out' if dropped else 'writes it as another'}; "
                        "rename the role, or remove such messages"
                    )
                if not dropped:
                    self._known_roles.add(role)
                    if role not in _USUAL_ROLES and not self._chat.names_role(role, tools):
                        self._custom_roles.add(role)
            self._count_custom_role(role, place)

    def _count_custom_role(self, role: str, place: str) -> None:
        """Count a message whose role may be misspelt: the template writes any."""
        if role in self._custom_roles:
            self._counts.count(
                f"messages have the role {role}, which the chat template writes like any name and "
                "which is not trained on",
                place,
            )

    def _is_unknown_role(self, role: str, messages: Messages, tools: Tools, text: str) -> bool:
        """Return whether the template treats ``role`` like a made-up role."""
        if self._chat.names_role(role, tools):
            return False
        other = [{**m, "role": _MADE_UP} if m["role"] == role else m for m in messages]
        try:
            return self._chat.render_text(other, tools) == text
        except RenderError:
            return False

    def _check_dropped_texts(
        self, messages: Messages, trained: list[bool], finder: TurnFinder, where: str
    ) -> None:
        """Count texts that the template does not write; refuse them in the last turn."""
        last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=-1)
        written = [piece for piece in finder.pieces if finder.is_piece_written(piece)]
        kept = {(piece.message, piece.text) for piece in written}
        for piece in finder.pieces:
            # the same reasoning under two names is written once
            again = piece.key not in ("content", "tool_calls")
            if piece in written or (again and (piece.message, piece.text) in kept):
                continue
            place = f"{where}, message {piece.message + 1}"
            what = _name_piece(piece, messages)
            if piece.message == last and trained[last]:
                raise UserError(
                    f"{place}: {self._chat} leaves out {what} of the last answer "
                    f"({piece.text!r:.60}), so that it would not be trained on; give the tokenizer "
                    "a template that writes it, or remove it from the records"
                )
            self._counts.count(f"texts ({what}) are left out by the chat template", place)

    def _report_missing_end(self, turn: str, index: int, where: str) -> None:
        if self._turn_end == "error":
            raise UserError(
                f"{where}, message {index + 1}: no token that ends generation closes the turn "
                f"({turn[-40:]!r}), so that the model would not learn to stop. Give the tokenizer "
                "a chat template that closes turns with its eos token or another token of its own, "
                "or train anyway with data.turn_end: warn"
            )
        self._counts.count(
            "assistant turns end with no token that ends generation",
            f"{where}, message {index + 1}",
        )

    # -- spans that contribute to the loss -------------------------------------------------------

    def _find_included_spans(
        self, left_out: Sequence[bool], finder: TurnFinder, text: str, where: str
    ) -> tuple[Span, ...]:
        """Return the spans of the text without the messages excluded from the loss."""
        cuts: list[Span] = []
        for index in (i for i, out in enumerate(left_out) if out):
            if any(finder.is_piece_written(p) for p in finder.pieces if p.message == index):
                span = finder.find_message(index)
                if span is None:
                    raise self._make_unclear_error(index, where)
                cuts.append(span)
        edges = [0, *(edge for cut in sorted(cuts) for edge in cut), len(text)]
        spans = zip(edges[::2], edges[1::2], strict=True)
        return tuple((start, stop) for start, stop in spans if start < stop)

    def _find_trained_spans(
        self,
        messages: Messages,
        trained: Sequence[bool],
        finder: TurnFinder,
        text: str,
        where: str,
    ) -> list[Span]:
        spans: list[Span] = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant" or not trained[index]:
                continue
            own = [piece for piece in finder.pieces if piece.message == index]
            if not any(finder.is_piece_written(piece) for piece in own):
                # the message is empty, or the template drops all of it
                self._counts.count("assistant messages are empty", f"{where}, message {index + 1}")
                continue
            turn = finder.find_turn(index)
            if turn is None or (spans and turn.start < spans[-1][1]):
                raise self._make_unclear_error(index, where)
            if not turn.closed and not _assistant_continues(messages, index):
                self._report_missing_end(text[turn.start : turn.stop], index, where)
            spans.extend(finder.split_at_eos(turn))
        return spans

    def _extend_marked_spans(
        self,
        generated: list[Span],
        messages: Messages,
        trained: Sequence[bool],
        finder: TurnFinder,
        text: str,
        where: str,
    ) -> list[Span]:
        """Return the spans that the template marks, each extended by its closing token."""
        spans = [self._extend_to_turn_end(text, span) for span in generated]
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            turn = finder.find_turn(index)
            if turn is None:
                if not trained[index] and any(
                    finder.is_piece_written(p) for p in finder.pieces if p.message == index
                ):
                    raise self._make_unclear_error(index, where)
                continue
            own = [s for s in spans if s[0] < turn.stop and turn.start < s[1]]
            if not trained[index]:
                spans = [span for span in spans if span not in own]
            elif own and not _assistant_continues(messages, index):
                start, stop = own[-1]
                if find_first_closing(text[start:stop], self._closing_pattern) != stop - start:
                    self._report_missing_end(text[start:stop], index, where)
        return spans

    def _extend_to_turn_end(self, text: str, span: Span) -> Span:
        start, stop = span
        if (closed := find_first_closing(text[start:stop], self._closing_pattern)) is not None:
            # white space after the token is not generated by the model
            return start, start + closed
        space = len(text[stop:]) - len(text[stop:].lstrip())
        found = self._closing_pattern.match(text, stop + space)
        return start, found.end() if found else stop

    def _make_unclear_error(self, index: int, where: str) -> UserError:
        return UserError(
            f"{where}: the chat template rewrites earlier turns (messages 1..{index + 1} rendered "
            "alone differ from their text in the whole conversation), so the assistant's part of "
            f"message {index + 1} cannot be located. Give the tokenizer a template with "
            "{% generation %} marks, split the conversation, or set data.loss_on: all (without "
            "weights of single messages)"
        )


def _assistant_continues(messages: Messages, index: int) -> bool:
    """Return whether the next message is the assistant's, too."""
    return index + 1 < len(messages) and messages[index + 1]["role"] == "assistant"


def _name_piece(piece: TextPiece, messages: Messages) -> str:
    role = messages[piece.message]["role"]
    if piece.key == "tool_calls":
        return "a tool call"
    return f"the {role} message" if piece.key == "content" else piece.key
