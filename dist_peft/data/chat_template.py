"""A tokenizer's chat template: its selection, and rendering with one kind of error.

A chat template is a program that came with the tokenizer. Any exception it raises means that it
refuses the conversation (``RenderError``); callers turn that into a message that names the template
and the record.
"""

import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any, cast

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from dist_peft.core.errors import UserError
from dist_peft.data.render_bound import find_resource_excess

__all__ = [
    "ChatTemplate",
    "Messages",
    "RenderError",
    "Span",
    "Tokenizer",
    "Tools",
    "make_default_chat_template",
]

Tokenizer = PreTrainedTokenizerBase
Messages = Sequence[dict[str, Any]]
Tools = list[dict[str, Any]]
Span = tuple[int, int]

_EXCESS: dict[str, str | None] = {}  # template -> exceeded limit; checked at first rendering only
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

_DEFAULT_TEMPLATE = (
    "{% if tools %}{{ '<|tools|>\n' }}"
    "{% for tool in tools %}{{ (tool | tojson) + '\n' }}{% endfor %}{% endif %}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' }}"
    "{% set content = message['content'] or '' %}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ content }}"
    "{% for call in message['tool_calls'] or [] %}"
    "{% set function = call['function'] or call %}"
    "{{ '\n' if content or not loop.first }}"
    "{{ '<tool_call>\n{\"name\": ' + (function['name'] | tojson) + ', \"arguments\": ' }}"
    "{{ (function['arguments'] or {}) | tojson }}{{ '}\n</tool_call>' }}"
    "{% endfor %}"
    "{{ eos_token }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ content + '\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def make_default_chat_template(starts_with_bos: bool) -> str:
    """Return the template for tokenizers without one: plain-text role lines, the tokenizer's eos.

    ``<|user|>\\nHi\\n<|assistant|>\\nHello</s>\\n``; tools are written before the conversation, one
    JSON object per line, and calls as ``<tool_call>`` blocks in the assistant's turn. To chat with
    the result, the inference side needs the same template: training saves it with the tokenizer in
    the adapter's directory.
    """
    return ("{{ bos_token }}" if starts_with_bos else "") + _DEFAULT_TEMPLATE


class RenderError(Exception):
    """The template cannot render a conversation; the text is the template's own message."""


class ChatTemplate:
    """The template that renders the conversations of one tokenizer.

    Args:
        tokenizer: its special tokens are passed to the template.
        template: Jinja text; None: the tokenizer's own, else this project's.
        starts_with_bos: whether documents of this tokenizer begin with bos; used only by this
            project's template.
        name: of the template in messages; by default that of the tokenizer.

    Attributes:
        is_default: the tokenizer has no template and this project's is used.

    Raises:
        UserError: the tokenizer's template is not text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: str | None = None,
        *,
        starts_with_bos: bool = True,
        name: str | None = None,
    ) -> None:
        self._tokenizer, self._name = tokenizer, name
        self.is_default = template is None and not tokenizer.chat_template
        self._fixed = make_default_chat_template(starts_with_bos) if self.is_default else template
        self._variables: dict[str, Any] = dict(tokenizer.special_tokens_map)
        named = tokenizer.chat_template
        for text in named.values() if isinstance(named, dict) else [named]:
            if not (self._fixed or isinstance(text, str)):
                raise UserError(
                    f"{self}: it must be text but is {type(text).__name__}; correct chat_template "
                    "in the tokenizer_config.json"
                )

    def __str__(self) -> str:
        if self._name is not None:
            return f"the chat template of {self._name}"
        name = self._tokenizer.name_or_path
        return f"the chat template of the tokenizer {name}" if name else "the chat template"

    def get_jinja_source(self, tools: Tools | None = None) -> str:
        """Return the Jinja text used for a conversation with these tools.

        Raises:
            RenderError: the tokenizer has several templates and none of them is the default.
        """
        if self._fixed is not None:
            return self._fixed
        try:
            return str(self._tokenizer.get_chat_template(None, tools))
        except ValueError as error:
            raise RenderError(str(error)) from None

    def marks_assistant_text(self, tools: Tools | None = None) -> bool:
        """Return whether the template itself marks the assistant's text."""
        return _GENERATION.search(self.get_jinja_source(tools)) is not None

    def names_role(self, role: str, tools: Tools | None = None) -> bool:
        """Return whether the template itself has the name of ``role`` in quotes."""
        return re.search(f"['\"]{re.escape(role)}['\"]", self.get_jinja_source(tools)) is not None

    def render_text(
        self, messages: Messages, tools: Tools | None = None, *, prompt: bool = False
    ) -> str:
        """Return the conversation as text.

        Args:
            prompt: append the generation prompt, which opens an assistant turn.

        Raises:
            RenderError: the template refuses it, or fails.
        """
        return self._render_template(messages, tools, prompt=prompt, marked=False)[0]

    def render_marked(
        self, messages: Messages, tools: Tools | None = None
    ) -> tuple[str, list[Span]]:
        """Return the conversation as text, and the spans that ``{% generation %}`` encloses.

        Raises:
            RenderError: the template refuses it, or fails.
        """
        return self._render_template(messages, tools, prompt=False, marked=True)

    def _render_template(
        self, messages: Messages, tools: Tools | None, *, prompt: bool, marked: bool
    ) -> tuple[str, list[Span]]:
        template = self.get_jinja_source(tools)

        def write() -> tuple[list[str], list[list[Span]]]:
            return cast(
                tuple[list[str], list[list[Span]]],
                render_jinja_template(
                    conversations=[list(messages)],
                    chat_template=template,
                    return_assistant_tokens_mask=marked,
                    add_generation_prompt=prompt,
                    tools=cast(Any, tools),
                    **self._variables,
                ),
            )

        if template not in _EXCESS:
            _EXCESS[template] = find_resource_excess(write)
        if (excess := _EXCESS[template]) is not None:
            raise RenderError(excess)
        try:
            texts, generated = write()
        # a template may raise anything: division by zero, endless recursion, a range that the
        # sandbox forbids, a missing content added to a string
        except Exception as error:
            said = " ".join(str(error).split()) or "no reason given"
            kind = type(error).__name__
            raise RenderError(said if kind == "TemplateError" else f"{kind}: {said}") from None
        if messages and not texts[0].strip():
            raise RenderError("it writes nothing")
        return texts[0], generated[0] if marked else []

    @property
    def eos_token(self) -> str:
        """Text of the tokenizer's eos; empty if it has none."""
        return str(self._tokenizer.eos_token or "")

    @cached_property
    def added_tokens(self) -> dict[str, int]:
        """Tokens that are matched literally in text, with their ids; eos is one of them."""
        tokens: dict[str, int] = dict(self._tokenizer.get_added_vocab())
        if self._tokenizer.eos_token is not None:
            tokens.setdefault(
                str(self._tokenizer.eos_token), cast(int, self._tokenizer.eos_token_id)
            )
        return {token: number for token, number in tokens.items() if token.strip()}

    @cached_property
    def special_tokens(self) -> frozenset[str]:
        """The subset of ``added_tokens`` that are control tokens rather than text, and eos."""
        decoder = self._tokenizer.added_tokens_decoder
        special = {str(token) for token in decoder.values() if token.special}
        return frozenset({*special, str(self._tokenizer.eos_token)} & set(self.added_tokens))

    @cached_property
    def token_pattern(self) -> re.Pattern[str]:
        """Pattern of any of ``added_tokens``, the longest first."""
        longest_first = sorted(self.added_tokens, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
