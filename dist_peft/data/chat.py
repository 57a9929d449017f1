"""Conversations become text and the character spans that the assistant wrote.

Only what the model has to produce is learnt: the assistant's turns with the token that ends them,
not the header that the inference side writes (``<|im_start|>assistant``)::

    <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHello<|im_end|>\\n
                                                          ^^^^^^^^^^^^^^^

A template that marks these parts itself (``{% generation %}``) is believed. For all others the
spans come from rendering the conversation piece by piece: a turn starts where the rendering of
the messages before it, with generation prompt, ends, and stops where the rendering that includes
it ends. That is right only if each such rendering is a prefix of the whole, which is checked; a
template that rewrites earlier turns is refused instead of masked wrongly.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from dist_peft.core.errors import UserError

__all__ = ["ChatRenderer", "RenderedChat", "Tokenizer", "default_chat_template"]

Tokenizer = PreTrainedTokenizerBase
Messages = list[dict[str, Any]]
Span = tuple[int, int]

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

_DEFAULT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def default_chat_template(starts_with_bos: bool) -> str:
    """The template for tokenizers that have none: plain-text role lines, the tokenizer's eos.

    ``<|user|>\\nHi\\n<|assistant|>\\nHello</s>\\n``. To chat with the result, the inference side
    needs the same template: training saves it with the tokenizer beside the adapter.
    """
    return ("{{ bos_token }}" if starts_with_bos else "") + _DEFAULT_TEMPLATE


@dataclass(frozen=True)
class RenderedChat:
    """``text`` holds its own special tokens; ``spans`` are the characters that are learnt."""

    text: str
    spans: tuple[Span, ...]


class ChatRenderer:
    """Renders conversations with the tokenizer's chat template.

    Args:
        mark_assistant: find the assistant's spans; else the whole text is one span.
        starts_with_bos: whether documents of this tokenizer begin with bos; matters only for a
            tokenizer without a template.

    ``notes`` collects what the user should hear once. ``default_template`` is the template of this
    project, where the tokenizer has none.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, mark_assistant: bool, starts_with_bos: bool
    ) -> None:
        self.tokenizer = tokenizer
        self.mark_assistant = mark_assistant
        self.notes: list[str] = []
        self.default_template: str | None = None
        if not tokenizer.chat_template:
            self.default_template = default_chat_template(starts_with_bos)
            self._note(
                "the tokenizer has no chat template: conversations are written as "
                "'<|role|>\\ncontent' with the eos token after assistant turns"
            )
        # an end-of-turn token is learnt, white space behind it is not the model's to write
        self._end_tokens = tuple(tokenizer.get_added_vocab())

    def render(
        self, messages: Messages, tools: list[dict[str, Any]] | None, where: str
    ) -> RenderedChat:
        """The conversation as text, and which characters are learnt.

        Raises:
            UserError: the template refuses the conversation, or rewrites earlier turns so that
                the assistant's part cannot be told. ``where`` names the record in it.
        """
        template = self._template(tools)
        variables: dict[str, Any] = {"tools": tools, **self.tokenizer.special_tokens_map}
        marks = self.mark_assistant and _GENERATION.search(template) is not None

        def rendered(part: Messages, prompt: bool = False) -> tuple[str, list[Span]]:
            try:
                texts, generated = cast(
                    tuple[list[str], list[list[Span]]],
                    render_jinja_template(
                        conversations=[part],
                        chat_template=template,
                        return_assistant_tokens_mask=marks,
                        add_generation_prompt=prompt,
                        **variables,
                    ),
                )
            # TypeError: a template that adds a missing content to a string
            except (TemplateError, TypeError) as error:
                raise UserError(
                    f"{where}: the chat template cannot write this conversation: {error}"
                ) from None
            return texts[0], generated[0] if marks else []

        text, spans = rendered(messages)
        if not self.mark_assistant:
            spans = [(0, len(text))]
        elif not marks:
            spans = self._spans(
                lambda part, prompt: rendered(part, prompt)[0], messages, text, where
            )
        return RenderedChat(text, tuple(spans))

    def _template(self, tools: list[dict[str, Any]] | None) -> str:
        if self.default_template is not None:
            template = self.default_template
        else:
            template = self.tokenizer.get_chat_template(None, tools)
        if tools and "tools" not in template:
            self._note("the chat template does not write tools: the records' tools are left out")
        return template

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def _spans(
        self, render: Callable[[Messages, bool], str], messages: Messages, text: str, where: str
    ) -> list[Span]:
        spans = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            start = _turn_start(render, messages[:index], text)
            stop = None
            if start is not None:
                stop = _turn_stop(render, messages[: index + 1], text, start, len(messages))
            if start is None or stop is None:
                raise UserError(
                    f"{where}: the chat template rewrites earlier turns (rendering messages "
                    f"1..{index + 1} alone gives no beginning of the whole), so it cannot be told "
                    f"what the assistant wrote in message {index + 1}. Give the tokenizer a "
                    "template with {% generation %} marks, split the conversation, or set "
                    "data.loss_on: all"
                )
            spans.append((start, self._without_trailing_space(text, start, stop)))
        return spans

    def _without_trailing_space(self, text: str, start: int, stop: int) -> int:
        turn = text[start:stop].rstrip()
        return start + len(turn) if turn.endswith(self._end_tokens) else stop


def _turn_start(render: Callable[[Messages, bool], str], before: Messages, text: str) -> int | None:
    if not before:
        return 0
    opened = render(before, True)
    if text.startswith(opened):
        return len(opened)
    # a generation prompt that a finished turn does not keep, such as an opened <think>
    closed = render(before, False)
    return len(closed) if text.startswith(closed) else None


def _turn_stop(
    render: Callable[[Messages, bool], str], upto: Messages, text: str, start: int, count: int
) -> int | None:
    if len(upto) == count:
        return len(text)
    alone = render(upto, False)
    if text.startswith(alone):
        return len(alone)
    # The template writes the last turn of a conversation differently from the same turn inside
    # it (Qwen3: a <think> block in front): what both share is the end of one, the start of other.
    content = (upto[-1].get("content") or "").strip()
    turn = alone[start:] if alone.startswith(text[:start]) else ""
    cut = turn.find(text[start], 1)
    while cut >= 0:
        shared = turn[cut:]
        if text.startswith(shared, start) and content in shared:
            return start + len(shared)
        cut = turn.find(text[start], cut + 1)
    return None
