"""``data.chat_template``: a chat template in place of the tokenizer's, as text or as a file."""

import copy
from pathlib import Path

from dist_peft.core.errors import UserError
from dist_peft.core.input_paths import refuse_special_file
from dist_peft.data.chat_template import ChatTemplate, RenderError, Tokenizer

__all__ = ["override_chat_template", "read_chat_template"]

_MARKS = ("{{", "{%")
"""One of these is in every template, and in no usual path."""


def read_chat_template(value: str) -> str:
    """Return the Jinja text of ``data.chat_template``, which is that text or the path of a file.

    Raises:
        UserError: no such file, or no Jinja.
    """
    if any(mark in value for mark in _MARKS):
        return value
    path = Path(value).expanduser()
    refuse_special_file(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = str(getattr(error, "strerror", None) or error).lower()
        raise UserError(
            f"data.chat_template {value} cannot be read: {reason} (looked in {Path.cwd()}); give a "
            "file of Jinja, or the text itself, which has {{ or {%"
        ) from None
    if not any(mark in text for mark in _MARKS):
        raise UserError(
            f"data.chat_template {value} is no chat template: it has no {{{{ or {{% of Jinja; give "
            "the file of a template, such as a model's chat_template.jinja"
        )
    return text


def override_chat_template(tokenizer: Tokenizer, text: str | None) -> Tokenizer:
    """Return the tokenizer itself without ``text``, else a copy that has it as its template.

    Raises:
        UserError: ``text`` is not valid Jinja.
    """
    if text is None:
        return tokenizer
    made = copy.copy(tokenizer)
    made.chat_template = text
    try:
        ChatTemplate(made, text).render_text([{"role": "user", "content": "Hi"}])
    except RenderError as error:  # one that refuses this conversation may accept those of the data
        if str(error).startswith("TemplateSyntaxError"):
            raise UserError(f"data.chat_template is not valid Jinja: {error}") from None
    return made
