import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_peft.core.errors import UserError
from dist_peft.data.chat import ChatRenderer
from dist_peft.data.chat_template import ChatTemplate, RenderError
from dist_peft.data.tool_calls import (
    check_tool_calls,
    parse_tool_arguments,
    render_tool_calls,
    serialize_tool_arguments,
    writes_python_form,
)
from tests.support.chat_families import FAMILIES
from tests.support.data_files import byte_tokenizer

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)


def call(arguments: Any) -> list[dict[str, Any]]:
    function = {"name": "f", "arguments": arguments}
    return [{"role": "assistant", "tool_calls": [{"id": "123456789", "function": function}]}]


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(st.text(max_size=3), VALUES, max_size=3))
def test_text_and_object_are_one(arguments: dict[str, Any]) -> None:
    assert parse_tool_arguments(call(json.dumps(arguments))) == call(arguments)
    assert parse_tool_arguments(serialize_tool_arguments(call(arguments))) == call(arguments)


@pytest.mark.parametrize("arguments", ["[1]", "no JSON", '"{}"', 5, None, "1" * 5000, "[" * 10**5])
def test_what_is_no_object_stays(arguments: Any) -> None:
    assert parse_tool_arguments(call(arguments)) == call(arguments)


def test_calls_without_function_and_empty_text() -> None:
    bare = [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": " "}, "odd"]}]
    (message,) = parse_tool_arguments(bare)
    assert message["tool_calls"] == [{"name": "f", "arguments": {}}, "odd"]
    assert writes_python_form("{'a': 1}", call({"a": 1}))
    assert not writes_python_form('{"a": 1}', call({"a": 1}))


@pytest.mark.parametrize("name", [n for n, f in FAMILIES.items() if f.tools] + ["default", "print"])
def test_both_forms_are_written_the_same_by_each_family(name: str) -> None:
    if name in FAMILIES:
        tokenizer = FAMILIES[name].tokenizer()
    else:
        tokenizer = byte_tokenizer()
        if name == "print":  # joins with what Python prints of an object
            tokenizer.chat_template = (
                "{% for m in messages %}{{ m.role }} {{ m.content }}"
                "{% for c in m.tool_calls or [] %}"
                "{{ c.function.name }} {{ c.function.arguments }}{% endfor %}{{ eos_token }}"
                "{% endfor %}"
            )
    written = []
    for arguments in ({"city": "Köln", "n": 2}, '{"city": "Köln", "n": 2}'):
        messages = [{"role": "user", "content": "u"}, *call(arguments)]
        messages[1]["content"] = ""
        messages[1]["tool_calls"][0]["type"] = "function"
        renderer = ChatRenderer(tokenizer, mark_assistant=True, starts_with_bos=True)
        chat = renderer.render_conversation(messages, None, "f, record 1")
        written.append("".join(chat.text[a:b] for a, b in chat.spans))
    assert written[0] == written[1]
    assert "Köln" in written[0] and "\\" not in written[0]
    assert "'" not in written[0]


@pytest.mark.parametrize("content", [None, "", "missing"])
@pytest.mark.parametrize("name", ["deepseek_r1", "deepseek_v31", "qwen25", "chatml"])
def test_content_beside_a_call_opens_no_turn(name: str, content: str | None) -> None:
    (message,) = call({"a": "x"})
    message["tool_calls"][0]["type"] = "function"
    if content != "missing":
        message["content"] = content
    messages = [{"role": "user", "content": "u"}, message]
    chat = ChatTemplate(FAMILIES[name].tokenizer())
    _, _, text = render_tool_calls(chat, messages, None)
    assert "None" not in text
    assert (
        sum(text.count(end) for end in FAMILIES[name].ends)
        == (2 if name == "chatml" else 1) + (name == "qwen25") * 2
    )


@pytest.mark.parametrize("calls", [[{}], [{"function": {"name": " "}}], "f()", [{"function": "f"}]])
def test_call_without_a_name_is_refused(calls: Any) -> None:
    with pytest.raises(UserError, match="r, message 1: tool_calls must be a list of objects"):
        check_tool_calls([{"role": "assistant", "tool_calls": calls}], "r")


def test_template_that_takes_no_form() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ messages[0].tool_calls[0].function.arguments.a.b.c }}"
    with pytest.raises(RenderError, match="UndefinedError"):
        render_tool_calls(ChatTemplate(tokenizer), call({"a": 1}), None)


@pytest.mark.parametrize("name", ["coder", "glm4", "qwen25"])
def test_tools_with_and_without_function_around_them(name: str) -> None:
    bare = {"name": "look_up", "parameters": {"properties": {"a": {"type": "string"}}}}
    chat = ChatTemplate(FAMILIES[name].tokenizer())
    messages = [{"role": "user", "content": "u"}]
    for tools in ([bare], [{"type": "function", "function": bare}]):
        _, _, text = render_tool_calls(chat, messages, tools)
        assert "look_up" in text


def test_older_form_of_calls_is_refused() -> None:
    message = {"role": "assistant", "content": "a", "function_call": {"name": "f"}}
    with pytest.raises(UserError, match="message 1: function_call is an older form"):
        check_tool_calls([message], "r")
