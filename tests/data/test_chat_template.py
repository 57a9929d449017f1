import pytest

from dist_peft.core.errors import UserError
from dist_peft.data.chat import ChatRenderer
from dist_peft.data.chat_template import ChatTemplate, RenderError
from tests.support.chat_families import FAMILIES
from tests.support.data_files import byte_tokenizer

MESSAGES = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
BROKEN = {
    "division by zero": "{{ 1 / 0 }}",
    "nothing": "{% for m in messages %}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "range": "{% for i in range(10 ** 9) %}x{% endfor %}",
    "syntax": "{% for m in messages %}",
    "attribute": "{{ messages[0].content.__class__.__mro__ }}",
    "undefined": "{{ nothing.at.all }}",
}


@pytest.mark.parametrize("template", BROKEN.values(), ids=BROKEN)
def test_broken_template_is_one_message(template: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.name_or_path = "some/base"
    tokenizer.chat_template = template
    with pytest.raises(RenderError):
        ChatTemplate(tokenizer).render_text(MESSAGES)
    renderer = ChatRenderer(tokenizer, mark_assistant=True, starts_with_bos=True)
    expected = r"^f, record 1: the chat template of the tokenizer some/base cannot write"
    with pytest.raises(UserError, match=expected):
        renderer.render_conversation(MESSAGES, None, "f, record 1")


def test_template_of_several() -> None:
    tokenizer = FAMILIES["chatml"].tokenizer()
    tokenizer.chat_template = {"default": "{{ 'plain' }}", "tool_use": "{{ 'tools' }}"}
    chat = ChatTemplate(tokenizer)
    assert chat.render_text(MESSAGES) == "plain"
    assert chat.render_text(MESSAGES, [{"name": "f"}]) == "tools"
    tokenizer.chat_template = {"one": "1", "two": "2"}
    with pytest.raises(RenderError, match="multiple chat templates"):
        ChatTemplate(tokenizer).render_text(MESSAGES)


def test_marked_characters() -> None:
    chat = ChatTemplate(FAMILIES["marked"].tokenizer())
    text, spans = chat.render_marked(MESSAGES)
    assert [text[a:b] for a, b in spans] == ["a<|im_end|>\n"]
    assert (
        chat.marks_assistant_text()
        and not ChatTemplate(FAMILIES["chatml"].tokenizer()).marks_assistant_text()
    )


def test_default_template_writes_tool_calls() -> None:
    chat = ChatTemplate(byte_tokenizer())
    calls = [{"function": {"name": "f", "arguments": {"a": "é"}}}]
    text = chat.render_text(
        [MESSAGES[0], {"role": "assistant", "tool_calls": calls}], [{"name": "f"}]
    )
    assert text == (
        '<s><|tools|>\n{"name": "f"}\n<|user|>\nu\n<|assistant|>\n'
        '<tool_call>\n{"name": "f", "arguments": {"a": "é"}}\n</tool_call></s>\n'
    )


def test_tokens_that_stand_for_themselves() -> None:
    chat = ChatTemplate(FAMILIES["qwen3"].tokenizer())
    assert "<think>" in chat.added_tokens and "<think>" not in chat.special_tokens
    assert {"<|im_end|>", "</s>"} <= chat.special_tokens
    found = [match[0] for match in chat.token_pattern.finditer("a<|im_end|><think>b")]
    assert found == ["<|im_end|>", "<think>"]
