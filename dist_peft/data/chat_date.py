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

from transformers.utils.chat_template_utils import render_jinja_template

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
        The tokenizer itself and None, where no template of it asks for the day; else a copy and the
        date as ``2026-11-28``.
    """
    templates = _templates(tokenizer)
    dated = {name: text for name, text in templates.items() if _NOW.search(text)}
    for name in templates.keys() - dated.keys():
        if _takes_date_string(tokenizer, templates[name]):
            log.warning(
                "the chat template writes the date given as date_string; nothing gives it in "
                "training, so rows have the template's default",
                extra=ONCE,
            )
    if not dated:
        return tokenizer, None
    frozen = {name: _freeze(text, date) for name, text in dated.items()}
    made = copy.copy(tokenizer)
    several = isinstance(tokenizer.chat_template, dict)
    made.chat_template = {**templates, **frozen} if several else frozen[""]
    log.warning(
        "the chat template %s the present day; in this run, also when it is resumed, it is %s",
        "writes" if template_writes_date(tokenizer) else "writes in some conversations",
        date.isoformat(),
        extra=ONCE,
    )
    return made, date.isoformat()


def template_writes_date(tokenizer: Tokenizer) -> bool:
    """Whether a short conversation is written otherwise on another day: rendered under two dates.

    False too for a template that refuses such conversations.
    """
    return any(
        _differs(tokenizer, (_freeze(text, _DATES[0]), {}), (_freeze(text, _DATES[1]), {}))
        for text in _templates(tokenizer).values()
    )


def _takes_date_string(tokenizer: Tokenizer, text: str) -> bool:
    first, second = ({"date_string": date.isoformat()} for date in _DATES)
    return "date_string" in text and _differs(tokenizer, (text, first), (text, second))


def _differs(tokenizer: Tokenizer, *ways: tuple[str, dict[str, str]]) -> bool:
    """Whether two templates, each with further variables, write a conversation differently."""
    user = {"role": "user", "content": "question"}
    answer = {"role": "assistant", "content": "answer"}
    system = {"role": "system", "content": "rules"}
    for messages in ([user, answer], [system, user, answer]):
        try:
            given: list[dict[str, Any]] = [
                {"chat_template": text, **tokenizer.special_tokens_map, **variables}
                for text, variables in ways
            ]
            first, second = (render_jinja_template([messages], **each) for each in given)
        except Exception:  # whatever a foreign program raises; told when a record is rendered
            continue
        if first != second:
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
