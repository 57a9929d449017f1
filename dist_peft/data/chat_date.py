"""Freezing the date that a chat template writes, so that it is the same for the whole run.

Templates of several families put the day into the system prompt, through the function
``strftime_now`` that ``transformers`` offers them. Otherwise a run resumed the next day would train
on other text, and ranks that start around midnight would differ. Here the date is frozen: a macro
``strftime_now`` that writes the chosen day is prepended to the template. ::

    {%- macro strftime_now(format) %}{{ format | replace("%Y", "2026") | ... }}{%- endmacro %}
    ...the template as it was...

Everything that depends on the template's text - the token cache, fingerprints - then depends on the
date. Some templates take a variable ``date_string`` instead, with a default date in the template:
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

__all__ = ["freeze_template_date", "template_writes_date"]

log = logging.getLogger("dist_peft")

_DIRECTIVES = "aAwdbBmyYHIpMSfjUWVuGcxXDFTRehn"
"""Directives of ``strftime``. Those without leading zeros, such as ``%-d``, are replaced first."""

_NOW = re.compile(r"\bstrftime_now\b")
_DATES = (datetime.date(2001, 2, 3), datetime.date(2016, 11, 25))
"""Two dates that differ in every part: year, month, day, weekday, week."""


def freeze_template_date(tokenizer: Tokenizer, date: datetime.date) -> tuple[Tokenizer, str | None]:
    """Return a tokenizer whose chat template writes ``date`` instead of the present day.

    Returns:
        The tokenizer itself and None, if none of its templates asks for the day; else a copy and
        the date as ``2026-11-28``.
    """
    templates = _get_templates(tokenizer)
    dated = {name: text for name, text in templates.items() if _NOW.search(text)}
    for name in templates.keys() - dated.keys():
        if _accepts_date_string(tokenizer, templates[name]):
            log.warning(
                "the chat template writes the variable date_string, which is not set in training, "
                "so the data has the template's default date",
                extra=ONCE,
            )
    if not dated:
        return tokenizer, None
    frozen = {name: _insert_frozen_date(text, date) for name, text in dated.items()}
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
    """Return whether a short conversation renders differently under two dates.

    False also for a template that refuses such conversations.
    """
    return any(
        _renders_differently(
            tokenizer,
            (_insert_frozen_date(text, _DATES[0]), {}),
            (_insert_frozen_date(text, _DATES[1]), {}),
        )
        for text in _get_templates(tokenizer).values()
    )


def _accepts_date_string(tokenizer: Tokenizer, text: str) -> bool:
    first, second = ({"date_string": date.isoformat()} for date in _DATES)
    return "date_string" in text and _renders_differently(tokenizer, (text, first), (text, second))


def _renders_differently(tokenizer: Tokenizer, *ways: tuple[str, dict[str, str]]) -> bool:
    """Return whether two templates, each with extra variables, render differently."""
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
        except Exception:  # a template may raise anything; reported when a record is rendered
            continue
        if first != second:
            return True
    return False


def _get_templates(tokenizer: Tokenizer) -> dict[str, str]:
    """Return a dict from name to template text; a single template has the name ''."""
    found = tokenizer.chat_template
    if isinstance(found, dict):
        return {name: text for name, text in found.items() if isinstance(text, str)}
    return {"": found} if isinstance(found, str) else {}


def _insert_frozen_date(template: str, date: datetime.date) -> str:
    moment = datetime.datetime.combine(date, datetime.time())
    names = [f"%-{letter}" for letter in "dmHIMSjy"] + [f"%{letter}" for letter in _DIRECTIVES]
    pairs = [("%%", "\x00"), *((name, moment.strftime(name)) for name in names), ("\x00", "%")]
    steps = "".join(
        f" | replace({_quote_jinja_string(old)}, {_quote_jinja_string(new)})" for old, new in pairs
    )
    # trim_blocks removes this line break after the block
    macro = "{%- macro strftime_now(format) %}{{ format" + steps + " }}{%- endmacro %}\n"
    return macro + template


def _quote_jinja_string(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
