"""Chat templates that write the date: which date, and the same one for the whole run.

Templates of several families put the day into the system prompt, through the function
``strftime_now`` that ``transformers`` offers them. Left alone, a run started again the next day
trains on other rows, and ranks that start at midnight have different ones. Here the date is frozen:
the template is given a ``strftime_now`` of its own, which writes the chosen day. ::

    {%- macro strftime_now(format) %}{{ format | replace("%Y", "2026") | ... }}{%- endmacro %}
    ...the template as it was...

Everything that depends on the template's text - the token cache, fingerprints - then depends on the
date. Some templates take a variable ``date_string`` instead, with a date of their own as default:
nothing sets it here, so they always write their default.
"""

import copy
import datetime
import logging
import re
from typing import Any

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from dist_peft.core.errors import UserError
from dist_peft.core.log import ONCE
from dist_peft.data.chat import Tokenizer

__all__ = ["template_writes_date", "with_frozen_date"]

log = logging.getLogger("dist_peft")

_DIRECTIVES = "aAwdbBmyYHIpMSfjUWVuGcxXDFTRehn"
"""Of ``strftime``. ``%-d`` and its like, without leading zeros, come first."""

_NOW = re.compile(r"\bstrftime_now\b")
_DATES = (datetime.date(2001, 2, 3), datetime.date(2016, 11, 25))
"""No part of the one is a part of the other: year, month, day, weekday, week."""


def with_frozen_date(tokenizer: Tokenizer, date: datetime.date) -> tuple[Tokenizer, str | None]:
    """A tokenizer whose chat template writes ``date`` wherever it would write the present day.

    Returns:
        The tokenizer itself and None, where its template (or none of several) writes no date; else
        a copy and the date as ``2026-11-28``.

    Raises:
        UserError: the template writes the present day in a way that cannot be frozen.
    """
    templates = _templates(tokenizer)
    dated = {name: text for name, text in templates.items() if _NOW.search(text)}
    _note_default_date(tokenizer, templates)
    if not dated:
        return tokenizer, None
    frozen = {name: _freeze(text, date) for name, text in dated.items()}
    made = copy.copy(tokenizer)
    if isinstance(tokenizer.chat_template, dict):
        made.chat_template = {**templates, **frozen}
    else:
        made.chat_template = frozen[""]
    for name in frozen:
        if template_writes_date(made, name):
            raise UserError(
                f"the chat template of {tokenizer.name_or_path} writes the present day in a way "
                "that cannot be frozen, so that rows would change from day to day; give the "
                "tokenizer a template with a fixed date"
            )
    return made, date.isoformat()


def template_writes_date(tokenizer: Tokenizer, name: str = "") -> bool:
    """Whether a short conversation is written otherwise on another day: rendered under two dates.

    False too for a template that refuses such conversations.
    """
    return _differs(tokenizer, name, "strftime_now", *(d.strftime for d in _DATES))


def _note_default_date(tokenizer: Tokenizer, templates: dict[str, str]) -> None:
    for name, text in templates.items():
        if "date_string" not in text or _NOW.search(text):
            continue
        if _differs(tokenizer, name, "date_string", *(d.isoformat() for d in _DATES)):
            log.warning(
                "the chat template writes the date given as date_string; nothing gives it in "
                "training, so rows have the template's default",
                extra=ONCE,
            )


def _differs(tokenizer: Tokenizer, name: str, variable: str, first: Any, second: Any) -> bool:
    user = {"role": "user", "content": "question"}
    answer = {"role": "assistant", "content": "answer"}
    system = {"role": "system", "content": "rules"}
    text = _templates(tokenizer)[name]
    for messages in ([user, answer], [system, user, answer]):
        try:
            known: dict[str, Any] = dict(tokenizer.special_tokens_map)
            made = [
                render_jinja_template([messages], chat_template=text, **known, **{variable: value})
                for value in (first, second)
            ]
        except (TemplateError, TypeError, ValueError):
            continue
        if made[0] != made[1]:
            return True
    return False


def _templates(tokenizer: Tokenizer) -> dict[str, str]:
    """Name -> text; the only template has the name ''."""
    found = tokenizer.chat_template
    if isinstance(found, dict):
        return {name: text for name, text in found.items() if isinstance(text, str)}
    return {"": found} if isinstance(found, str) else {}


def _freeze(template: str, date: datetime.date) -> str:
    moment = datetime.datetime.combine(date, datetime.time())
    names = [f"%-{letter}" for letter in "dmHIMSjy"] + [f"%{letter}" for letter in _DIRECTIVES]
    pairs = [("%%", "\x00"), *((name, moment.strftime(name)) for name in names), ("\x00", "%")]
    steps = "".join(f" | replace({_quoted(old)}, {_quoted(new)})" for old, new in pairs)
    # the line break is the block's own, which trim_blocks takes away
    macro = "{%- macro strftime_now(format) %}{{ format" + steps + " }}{%- endmacro %}\n"
    return macro + template


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
