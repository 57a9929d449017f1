from pathlib import Path
from typing import Any, Literal

import pytest
from transformers import PreTrainedTokenizerFast

from dist_peft.core.config.run import DataSource
from dist_peft.core.errors import UserError
from dist_peft.data.chat import ChatRenderer, RenderedChat, make_default_chat_template
from dist_peft.data.tokens import load_token_documents
from tests.support.chat_families import FAMILIES
from tests.support.data_files import byte_tokenizer, data_config, write_jsonl

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
)
# as Qwen3: only the last turn gets a think block, and reasoning of earlier turns is dropped
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m.content.split('</think>')[-1] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# as DeepSeek-R1: the generation prompt opens a think block that finished turns do not have
OPENS_THINKING = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<User>' + m.content }}"
    "{% else %}{{ '<Bot>' + m.content + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<Bot><think>\n' }}{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}"
    "{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
REVERSED = "{% for m in messages[::-1] %}{{ m.role + m.content }}{% endfor %}"

TWO_TURNS = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "i"},
    {"role": "user", "content": "two"},
    {"role": "assistant", "content": "second"},
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer(specials=["<|im_start|>", "<|im_end|>"])


def render(
    tokenizer: PreTrainedTokenizerFast,
    template: str | None,
    messages: list[dict[str, Any]],
    *,
    mark: bool = True,
    tools: list[dict[str, Any]] | None = None,
    turn_end: Literal["error", "warn"] = "error",
) -> tuple[RenderedChat, list[str]]:
    tokenizer.chat_template = template
    renderer = ChatRenderer(tokenizer, mark_assistant=mark, starts_with_bos=True, turn_end=turn_end)
    return renderer.render_conversation(messages, tools, "f.jsonl, record 3"), renderer.user_notes


def list_targets(chat: RenderedChat) -> list[str]:
    return [chat.text[a:b] for a, b in chat.spans]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, ["i<|im_end|>", "second<|im_end|>"]),
        (CHATML_MARKED, ["i<|im_end|>", "second<|im_end|>"]),
        (THINKING, ["i<|im_end|>", "<think>\n\n</think>\n\nsecond<|im_end|>"]),
        (None, ["i</s>", "second</s>"]),
    ],
)
def test_assistant_turns_with_their_end_are_learnt(
    tokenizer: PreTrainedTokenizerFast, template: str | None, expected: list[str]
) -> None:
    chat, _ = render(tokenizer, template, TWO_TURNS)
    assert list_targets(chat) == expected


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (LLAMA2, [" i </s>", " second </s>"]),
        # the prompt at inference opens a block that finished turns do not have
        (OPENS_THINKING, ["i</s>", "second</s>"]),
    ],
)
def test_templates_without_a_plain_generation_prompt(
    tokenizer: PreTrainedTokenizerFast, template: str, expected: list[str]
) -> None:
    chat, _ = render(tokenizer, template, TWO_TURNS[1:])
    assert list_targets(chat) == expected


def test_marked_and_incremental_agree(tokenizer: PreTrainedTokenizerFast) -> None:
    assert render(tokenizer, CHATML, TWO_TURNS)[0] == render(tokenizer, CHATML_MARKED, TWO_TURNS)[0]


def test_neighbouring_assistant_turns_and_one_at_the_start(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    messages = [{"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}]
    chat, _ = render(tokenizer, CHATML, messages)
    assert list_targets(chat) == ["a<|im_end|>", "b<|im_end|>"]


def test_no_assistant_turn_learns_nothing(tokenizer: PreTrainedTokenizerFast) -> None:
    for template in (CHATML, CHATML_MARKED, None):
        assert list_targets(render(tokenizer, template, TWO_TURNS[:2])[0]) == []


def test_without_marking_all_is_learnt_whatever_the_template(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    for template in (CHATML, CHATML_MARKED, REVERSED):
        chat, _ = render(tokenizer, template, TWO_TURNS, mark=False, turn_end="warn")
        assert list_targets(chat) == [chat.text]


def test_a_template_that_rewrites_turns_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    expected = r"f.jsonl, record 3: the chat template rewrites earlier turns .*generation.*loss_on"
    with pytest.raises(UserError, match=expected):
        render(tokenizer, REVERSED, TWO_TURNS)


def test_reasoning_that_is_dropped_from_earlier_turns_is_counted(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    messages = [
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "<think>why</think>because"},
        {"role": "user", "content": "v"},
        {"role": "assistant", "content": "ok"},
    ]
    chat, notes = render(tokenizer, THINKING, messages)
    assert list_targets(chat) == ["because<|im_end|>", "<think>\n\n</think>\n\nok<|im_end|>"]
    assert notes == [
        "1 texts (<think>) are left out by the chat template; the first is f.jsonl, record 3, "
        "message 2"
    ]
    with pytest.raises(UserError, match=r"record 3, message 2: .*leaves out <think> .*'why'"):
        render(tokenizer, THINKING, messages[:2])


def test_a_template_that_refuses_is_quoted(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match=r"record 3: .*cannot write this conversation: no systems"):
        render(tokenizer, "{{ raise_exception('no systems') }}", TWO_TURNS)
    with pytest.raises(UserError, match=r"record 3: .*cannot write this conversation"):
        render(tokenizer, CHATML, [{"role": "assistant"}])


def test_default_template_is_noted_and_starts_with_bos(tokenizer: PreTrainedTokenizerFast) -> None:
    chat, notes = render(tokenizer, None, TWO_TURNS[1:3])
    assert chat.text == "<s><|user|>\none\n<|assistant|>\ni</s>\n"
    assert len(notes) == 1
    assert "no chat template" in notes[0]
    assert "bos_token" not in make_default_chat_template(starts_with_bos=False)


def test_default_template_is_what_inference_renders(tokenizer: PreTrainedTokenizerFast) -> None:
    trained, _ = render(tokenizer, None, TWO_TURNS)
    tokenizer.chat_template = make_default_chat_template(starts_with_bos=True)
    prompt = tokenizer.apply_chat_template(
        TWO_TURNS[:-1], tokenize=False, add_generation_prompt=True
    )
    assert prompt == trained.text[: trained.spans[-1][0]]


def test_tools_reach_the_template_or_are_noted(tokenizer: PreTrainedTokenizerFast) -> None:
    tools = [{"name": "f"}]
    chat, notes = render(tokenizer, "{{ tools[0].name }}" + CHATML, TWO_TURNS, tools=tools)
    assert chat.text.startswith("f<|im_start|>")
    assert notes == []
    _, notes = render(tokenizer, CHATML, TWO_TURNS, tools=tools)
    assert notes == ["the chat template does not write tools: the records' tools are left out"]


# -- what must not be lost -----------------------------------------------------------------------


def family_render(
    name: str, messages: list[dict[str, Any]], **settings: Any
) -> tuple[list[str], list[str]]:
    """What contributes to the loss, and the notes."""
    renderer = ChatRenderer(
        FAMILIES[name].tokenizer(), mark_assistant=True, starts_with_bos=True, **settings
    )
    chat = renderer.render_conversation(messages, None, "f, record 1")
    return list_targets(chat), renderer.user_notes


ASKED = {"role": "user", "content": "question"}
ANSWERED = {"role": "assistant", "content": "answer"}


@pytest.mark.parametrize(
    ("name", "role"),
    [("phi3", "tool"), ("zephyr", "tool"), ("llama2", "tool"), ("harmony", "narrator")],
)
def test_role_that_the_template_does_not_know(name: str, role: str) -> None:
    messages = [ASKED, ANSWERED, ASKED, {"role": role, "content": "so"}, ANSWERED]
    if name == "llama2":  # any role but user is written as the assistant's
        messages = [ASKED, {"role": role, "content": "so"}, ASKED, ANSWERED]
    with pytest.raises(UserError, match=rf"message [24]: .* does not know the role {role}"):
        family_render(name, messages)


def test_system_message_that_is_left_out() -> None:
    tokenizer = FAMILIES["zephyr"].tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("'system'", "'context'")
    renderer = ChatRenderer(tokenizer, mark_assistant=True, starts_with_bos=True)
    messages = [{"role": "system", "content": "be"}, ASKED, ANSWERED]
    with pytest.raises(UserError, match=r"message 1: .*the role system, and leaves it out"):
        renderer.render_conversation(messages, None, "f, record 1")


@pytest.mark.parametrize(("name", "role"), [("chatml", "narrator"), ("qwen25", "tool")])
def test_roles_that_are_written(name: str, role: str) -> None:
    messages = [ASKED, {"role": role, "content": "so"}, {"role": role, "content": "yes"}, ANSWERED]
    trained, notes = family_render(name, messages)
    assert trained == ["answer<|im_end|>"]
    assert notes == (
        []
        if role == "tool"
        else [
            "2 messages have the role narrator, which the chat template writes like any name and "
            "which is not trained on; the first is f, record 1, message 2"
        ]
    )


@pytest.mark.parametrize("role", ["wizard", "asistant", "Assistant", "ipython"])
def test_unknown_role_without_a_template(role: str) -> None:
    renderer = ChatRenderer(byte_tokenizer(), mark_assistant=True, starts_with_bos=True)
    messages = [ASKED, {"role": role, "content": "so"}, ANSWERED]
    with pytest.raises(
        UserError, match=rf"record 1, message 2: the role {role} is unknown; .*, tool, function"
    ):
        renderer.render_conversation(messages, None, "f, record 1")


def test_developer_message_that_is_left_out_is_counted() -> None:
    messages = [{"role": "developer", "content": "be brief"}, ASKED, ANSWERED]
    trained, notes = family_render("qwen3", messages)
    assert trained == ["<think>\n\n</think>\n\nanswer<|im_end|>"]
    assert notes == [
        "1 texts (the developer message) are left out by the chat template; the first is f, "
        "record 1, message 1"
    ]
    assert family_render("harmony", messages)[1] == []


@pytest.mark.parametrize(
    ("name", "key", "kept"),
    [
        ("qwen3", "reasoning_content", True),
        ("glm45", "reasoning_content", True),
        ("qwen25", "reasoning_content", False),
        ("deepseek_r1", "reasoning_content", False),
        ("qwen3", "thinking", True),
        ("llama31", "reasoning", False),
    ],
)
def test_reasoning_of_the_last_turn_is_written_or_refused(name: str, key: str, kept: bool) -> None:
    messages = [ASKED, {**ANSWERED, key: "because of this"}]
    if kept:
        assert "because of this" in family_render(name, messages)[0][0]
        return
    with pytest.raises(UserError, match=rf"message 2: .*leaves out {key} of the last answer"):
        family_render(name, messages)


def test_think_block_of_the_last_turn() -> None:
    thought = {"role": "assistant", "content": "<think>because</think>\n\nanswer"}
    assert family_render("qwen3", [ASKED, thought])[0] == [
        "<think>\nbecause\n</think>\n\nanswer<|im_end|>"
    ]
    for name in ("deepseek_r1", "deepseek_v31"):
        with pytest.raises(UserError, match="leaves out <think> of the last answer"):
            family_render(name, [ASKED, thought])
    # of a turn that is context only it is counted
    trained, notes = family_render(
        "deepseek_r1", [ASKED, ANSWERED, ASKED, {**thought, "weight": 0}]
    )
    assert len(trained) == 1 and "texts (<think>)" in notes[0]


def test_text_beside_a_call_that_is_left_out() -> None:
    call = {"function": {"name": "look_up", "arguments": {}}}
    with pytest.raises(UserError, match="leaves out the assistant message of the last answer"):
        family_render("llama31", [ASKED, {**ANSWERED, "tool_calls": [call]}])
    with pytest.raises(UserError, match="leaves out a tool call of the last answer"):
        family_render("harmony", [ASKED, {"role": "assistant", "tool_calls": [call, call]}])
    with pytest.raises(UserError, match="leaves out a tool call of the last answer"):
        family_render("zephyr", [ASKED, {**ANSWERED, "tool_calls": [call]}])


@pytest.mark.parametrize("name", ["chatml", "marked", "marked_without_end", "glm4"])
def test_empty_answers_are_counted(name: str) -> None:
    messages = [ASKED, {"role": "assistant", "content": " "}, ASKED, ANSWERED]
    trained, notes = family_render(name, messages)
    assert len(trained) - trained.count(" <|im_end|>") == 1
    assert trained[-1].strip().startswith("answer")
    assert name.startswith("marked") or "1 assistant messages are empty" in notes[0]


@pytest.mark.parametrize(
    "flag", [{"weight": 0}, {"train": False}, {"trainable": "false"}, {"loss_mask": 0}]
)
def test_messages_left_out_of_the_loss_on_all(
    tokenizer: PreTrainedTokenizerFast, flag: dict[str, Any]
) -> None:
    messages = [ASKED, {**ANSWERED, **flag}, ASKED, ANSWERED]
    chat, _ = render(tokenizer, CHATML, messages, mark=False)
    whole, _ = render(tokenizer, CHATML, [ASKED, ANSWERED, ASKED, ANSWERED], mark=False)
    assert chat.text == whole.text and list_targets(whole) == [whole.text]
    answer = f"{ANSWERED['content']}<|im_end|>"
    start = whole.text.index(answer)
    assert list_targets(chat) == [whole.text[:start], whole.text[start + len(answer) :]]


def test_a_question_left_out_of_the_loss_on_all(tokenizer: PreTrainedTokenizerFast) -> None:
    chat, _ = render(tokenizer, CHATML, [{**ASKED, "weight": 0}, ANSWERED], mark=False)
    assert list_targets(chat) == chat.text.split(ASKED["content"], 1)


def test_a_cut_that_cannot_be_told_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    cuts = "{% for m in messages %}{{ m.role + m.content[1:] + eos_token }}{% endfor %}"
    messages = [{**ASKED, "content": "xxxx question", "weight": 0}, ANSWERED]
    with pytest.raises(UserError, match="cannot be located"):
        render(tokenizer, cuts, messages, mark=False)


def test_half_a_surrogate_pair_in_tools(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match="record 3 is not valid Unicode"):
        render(tokenizer, None, [ASKED, ANSWERED], tools=[{"name": "\ud800"}])


def test_answers_of_a_prompt_of_messages_do_not_contribute(tmp_path: Path) -> None:
    """TRL's prompt and completion."""
    record = {"prompt": [ASKED, {**ANSWERED, "content": "before"}, ASKED], "completion": [ANSWERED]}
    file = write_jsonl(tmp_path / "a.jsonl", [record])
    tokenizer = FAMILIES["chatml"].tokenizer()
    source = DataSource(path=str(file))
    documents = load_token_documents(data_config(tmp_path), source, tokenizer, "data.train[0]")
    assert tokenizer.decode(documents.tokens[documents.mask == 1]) == "answer<|im_end|>"
