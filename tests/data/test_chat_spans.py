"""Over the templates of many families: exactly the assistant's words contribute to the loss."""

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from dist_peft.core.errors import UserError
from dist_peft.data.chat import ChatRenderer
from dist_peft.data.chat_spans import find_first_closing
from dist_peft.data.chat_template import ChatTemplate
from dist_peft.data.examples import ChatExample
from dist_peft.data.files import RecordPlace
from dist_peft.data.tokens import ExampleEncoder
from tests.support.chat_families import FAMILIES, Family

_EMPTY_THOUGHT = "<think>\n\n</think>\n\n"
_EOS = "\uff5c".join(["<", "end\u2581of\u2581sentence", ">"])
# what a family writes around an answer in the middle; around the last one, where that differs
AROUND: dict[str, tuple[str, str] | tuple[str, str, str, str]] = {
    "qwen3": ("", "<|im_end|>", _EMPTY_THOUGHT, "<|im_end|>"),
    # the prompt of inference has the first line of it
    "qwen3_thinking": ("", "<|im_end|>", "\n</think>\n\n", "<|im_end|>"),
    "llama31": ("", "<|eot_id|>"),
    "llama2": (" ", " </s>"),
    "glm4": ("\n", "<|user|>"),
    "glm45": ("\n<think></think>\n", "<|user|>"),
    "mistral": (" ", "</s>"),
    "gemma2": ("", "<end_of_turn>"),
    "gemma3": ("", "<end_of_turn>"),
    "deepseek_r1": ("", _EOS),
    "deepseek_v31": ("", _EOS),
    "phi3": ("", "<|end|>"),
    "command_r": ("<|START_RESPONSE|>", "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"),
    "harmony": (
        *("<|channel|>final<|message|>", "<|end|>"),
        *("<|channel|>final<|message|>", "<|return|>"),
    ),
    "zephyr": ("", "</s>"),
}
ALL = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
FEW = settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
TEXTS = st.text("bcde \n<é🙂?", min_size=1, max_size=8).map(str.strip).filter(bool)


@cache
def tokenizer_of(family: Family) -> PreTrainedTokenizerFast:
    return family.tokenizer()


def trained_text(family: Family, messages: list[dict[str, Any]], **more: Any) -> str:
    tokenizer = tokenizer_of(family)
    ((tokens, mask),) = ExampleEncoder(tokenizer, "completion").encode_examples(
        [ChatExample(messages, more.get("tools"))], [RecordPlace("f", 1)]
    )
    return str(tokenizer.decode(tokens[mask == 1]))


def expected_text(family: Family, answers: Sequence[str], trained: Sequence[bool]) -> str:
    around = AROUND.get(family.name, ("", "<|im_end|>"))
    parts = [around[0] + answer + around[1] for answer in answers]
    parts[-1] = around[-2] + answers[-1] + around[-1]
    return "".join(part for part, wanted in zip(parts, trained, strict=True) if wanted)


@ALL
@FEW
@given(data=st.data())
def test_exactly_the_answers_with_their_end(family: Family, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 3))
    answers = data.draw(st.lists(TEXTS, min_size=count, max_size=count))
    trained = data.draw(st.lists(st.booleans(), min_size=count, max_size=count))
    key, off = data.draw(
        st.sampled_from([("weight", 0), ("train", False), ("trainable", False), ("loss_mask", 0)])
    )
    messages: list[dict[str, Any]] = []
    if family.system and data.draw(st.booleans()):
        messages.append({"role": "system", "content": data.draw(TEXTS)})
    for answer, wanted in zip(answers, trained, strict=True):
        messages.append({"role": "user", "content": data.draw(TEXTS)})
        said = {"role": "assistant", "content": answer}
        messages.append(said if wanted else {**said, key: off})
    assert trained_text(family, messages) == expected_text(family, answers, trained)


@pytest.mark.parametrize(
    "family", [f for f in FAMILIES.values() if f.assistant_first], ids=lambda f: f.name
)
@pytest.mark.parametrize("system", [False, True])
def test_assistant_speaks_first(family: Family, system: bool) -> None:
    """Neither a default system prompt nor the header contribute to the loss."""
    messages = [
        {"role": "assistant", "content": "bccd"},
        {"role": "user", "content": "ee"},
        {"role": "assistant", "content": "dd"},
    ]
    if system:
        messages.insert(0, {"role": "system", "content": "be"})
    assert trained_text(family, messages) == expected_text(family, ["bccd", "dd"], [True, True])


@pytest.mark.parametrize("family", [f for f in FAMILIES.values() if f.tools], ids=lambda f: f.name)
@pytest.mark.parametrize("trained", [True, False])
def test_tool_calls_contribute_and_results_do_not(family: Family, trained: bool) -> None:
    function = {"name": "look_up", "arguments": {"query": "zebra"}}
    call = {"id": "call00001", "type": "function", "function": function}
    schema = {"type": "object", "properties": {"query": {"type": "string"}}}
    tool = {"type": "function", "function": {"name": "look_up", "parameters": schema}}
    messages = [
        {"role": "user", "content": "question"},
        {"role": "assistant", "content": "", "tool_calls": [call], "train": trained},
        {"role": "tool", "content": "result", "name": "look_up", "tool_call_id": "call00001"},
        {"role": "assistant", "content": "answer"},
    ]
    text = trained_text(family, messages, tools=[tool])
    assert ("look_up" in text, "zebra" in text) == (trained, trained)
    assert "question" not in text
    assert "result" not in text
    assert text.count("answer") == 1
    ends = [text.count(end) for end in family.ends]
    assert sum(ends) == (2 if trained else 1), text
    assert text.endswith(tuple(family.ends))


def test_conversation_that_ends_with_a_call_ends_with_the_marker_of_its_result() -> None:
    call = {"type": "function", "function": {"name": "look_up", "arguments": {}}}
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    assert trained_text(FAMILIES["glm4"], messages) == "look_up\n{}<|observation|>"


@pytest.mark.parametrize("name", ["qwen3_thinking", "deepseek_r1"])
def test_text_that_begins_as_the_prompt_of_inference_ends(name: str) -> None:
    """Both prompts end with an opened <think>, as the text begins."""
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "<think>\nhm"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "bcd"},
    ]
    end = FAMILIES[name].ends[0]
    assert trained_text(FAMILIES[name], messages).startswith(f"hm{end}")


def test_closing_tokens_at_the_end() -> None:
    closing = re.compile("<e>|<f>")
    assert find_first_closing("a<e>\n<f>", closing) == 4
    assert find_first_closing("a<e>b", closing) is None
    assert find_first_closing("<e>b<f> ", closing) == 7


@pytest.mark.parametrize("name", ["chatml", "marked", "marked_without_end"])
def test_turn_that_no_token_ends_is_refused(name: str) -> None:
    family = FAMILIES[name]
    tokenizer = family.tokenizer()
    tokenizer.chat_template = family.template.replace("<|im_end|>", "<|stop|>")
    messages = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "says"}]
    with pytest.raises(UserError, match=r"f, record 1, message 2: no token .*says.*turn_end: warn"):
        ExampleEncoder(tokenizer, "completion").encode_examples(
            [ChatExample(messages)], [RecordPlace("f", 1)]
        )
    warned = ExampleEncoder(tokenizer, "completion", "warn")
    warned.encode_examples([ChatExample(messages)], [RecordPlace("f", 1)])
    assert "1 assistant turns end with no token" in warned.user_notes[-1]


def test_template_is_text() -> None:
    tokenizer = FAMILIES["chatml"].tokenizer()
    tokenizer.chat_template = 5
    with pytest.raises(UserError, match="must be text but is int"):
        ChatTemplate(tokenizer)


def test_header_behind_eos_inside_a_message_is_no_target() -> None:
    family = FAMILIES["deepseek_r1"]
    tokenizer = family.tokenizer()
    tokenizer.eos_token = family.specials[2]
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "said", "tool_calls": [call]},
    ]
    renderer = ChatRenderer(tokenizer, mark_assistant=True, starts_with_bos=True)
    chat = renderer.render_conversation(messages, None, "r")
    parts = [chat.text[a:b] for a, b in chat.spans]
    eos = tokenizer.eos_token
    assert len(parts) == 2 and parts[1] == "said" + eos
    assert parts[0].endswith(eos)
    # between both parts the header alone, as in front of the first one
    header = chat.text[chat.spans[0][1] : chat.spans[1][0]]
    assert "Assistant" in header and chat.text[: chat.spans[0][0]].endswith(header)
