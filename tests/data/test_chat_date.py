"""Templates that write the date are found by rendering, and write one date from then on."""

import datetime
import logging
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from dist_peft.data.chat_date import _insert_frozen_date, freeze_template_date, template_writes_date
from dist_peft.model.hub import Tokenizer, load_tokenizer
from tests.support.tiny_runs import save_words

DAY = datetime.date(2024, 2, 9)
CHAT = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
# as the templates of these families have it
TEMPLATES = {
    "llama-3.2": "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    "{%- set date_string = strftime_now('%d %b %Y') %}{%- else %}"
    "{%- set date_string = '26 Jul 2024' %}{%- endif %}{%- endif %}Today: {{ date_string }}\n",
    "smollm3": '{%- set today = strftime_now("%d %B %Y") -%}{{ today }}\n',
    "mistral": "{%- set today = strftime_now('%Y-%m-%d') %}{{ today }}"
    "{{ ' before ' ~ (strftime_now('%Y')|int - 1) }}\n",
    "computed": "{% set f = '%-d/%m at 100%% %A %j' %}{{ strftime_now(f) }}\n",
}
WRITTEN = {
    "llama-3.2": "Today: 09 Feb 2024\n",
    "smollm3": "09 February 2024\n",
    "mistral": "2024-02-09 before 2023\n",
    "computed": "9/02 at 100% Friday 040\n",
}
MESSAGES: list[dict[str, Any]] = [{"role": "user", "content": "hi"}]


@pytest.fixture
def words(tmp_path: Path) -> Tokenizer:
    save_words(tmp_path)
    return load_tokenizer(tmp_path)


def render(template: str, **variables: Any) -> str:
    return str(render_jinja_template([MESSAGES], chat_template=template, **variables)[0][0])


@pytest.mark.parametrize("name", TEMPLATES)
def test_date_is_found_and_frozen(words: Tokenizer, name: str) -> None:
    words.chat_template = TEMPLATES[name] + CHAT
    assert template_writes_date(words)
    frozen, date = freeze_template_date(words, DAY)
    assert date == "2024-02-09" and not template_writes_date(frozen)
    text = frozen.apply_chat_template(MESSAGES, tokenize=False)
    assert text == WRITTEN[name] + "user: hi\n"
    assert text != render(words.chat_template)  # of today
    assert template_writes_date(words)  # the given one is as it was


@pytest.mark.parametrize("start", ["\n{{ 'x' }}", "  {%- if true %}y{% endif %}", "plain\n"])
def test_text_around_the_date_stays(words: Tokenizer, start: str) -> None:
    words.chat_template = start + "{{ strftime_now('%Y') }}" + CHAT
    frozen, _ = freeze_template_date(words, DAY)
    expected = render(start + "2024" + CHAT)
    assert frozen.apply_chat_template(MESSAGES, tokenize=False) == expected


def test_template_without_date_is_left_alone(words: Tokenizer) -> None:
    assert freeze_template_date(words, DAY) == (words, None)
    words.chat_template = CHAT
    assert freeze_template_date(words, DAY) == (words, None) and not template_writes_date(words)


def test_of_several_templates_the_dated_one(words: Tokenizer) -> None:
    words.chat_template = {"default": CHAT, "tool_use": TEMPLATES["smollm3"] + CHAT}
    frozen, date = freeze_template_date(words, DAY)
    assert date == "2024-02-09"
    assert frozen.chat_template["default"] == CHAT
    assert "09 February 2024" in render(frozen.chat_template["tool_use"])


def test_date_given_as_variable_is_named(
    words: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    """Llama-3.1: a fixed default, so that nothing changes from day to day."""
    words.chat_template = (
        "{%- if not date_string is defined %}{%- set date_string = '26 Jul 2024' %}{%- endif %}"
        "{{ date_string }}" + CHAT
    )
    with caplog.at_level(logging.WARNING, "dist_peft"):
        assert freeze_template_date(words, DAY) == (words, None)
    assert "writes the variable date_string" in caplog.text


@pytest.mark.parametrize("broken", ["{{ 1 / 0 }}", "{% for i in range(10 ** 9) %}{% endfor %}"])
def test_template_that_fails_is_told_with_the_first_record(words: Tokenizer, broken: str) -> None:
    words.chat_template = "{{ strftime_now('%Y') }}" + broken
    frozen, date = freeze_template_date(words, DAY)
    assert date == "2024-02-09" and not template_writes_date(frozen)
    words.chat_template = "{{ date_string }}" + broken
    assert freeze_template_date(words, DAY) == (words, None)


@settings(max_examples=15)
@given(
    st.dates(datetime.date(1970, 1, 1), datetime.date(2100, 12, 31)),
    st.lists(st.sampled_from(["%d", "%-d", "%b", "%B", "%Y", "%%", "%A", "%j", "d", " "])),
)
def test_same_as_strftime(date: datetime.date, parts: list[str]) -> None:
    wanted = "".join(parts)
    template = "{{ strftime_now('" + wanted + "') }}"
    assert render(_insert_frozen_date(template, date)) == date.strftime(wanted)
