import json
from pathlib import Path
from typing import Any

import pytest

from dist_peft.core.errors import UserError
from dist_peft.data.examples import ChatExample, CompletionExample, TextExample
from dist_peft.data.sources import Example
from tests.support.data_files import build_examples


def one(tmp_path: Path, record: dict[str, Any], **fields: Any) -> Example:
    (example,) = build_examples(tmp_path, [record], **fields)
    return example


# -- formats -------------------------------------------------------------------------------------


def test_completion_and_text(tmp_path: Path) -> None:
    record = {"prompt": "p", "completion": "c"}
    assert one(tmp_path, record) == CompletionExample("p", "c")
    assert one(tmp_path, {"text": "t"}) == TextExample("t")


def test_alpaca_prompt_with_and_without_input(tmp_path: Path) -> None:
    tail = "\n\n### Response:"
    with_input = one(tmp_path, {"instruction": "I", "input": "X", "output": "O"})
    assert isinstance(with_input, CompletionExample)
    assert with_input.prompt.endswith("### Instruction:\nI\n\n### Input:\nX" + tail)
    assert "paired with an input" in with_input.prompt
    for record in ({"input": ""}, {"input": None}, {}):
        without = one(tmp_path, {"instruction": "I", "output": "O", **record})
        assert isinstance(without, CompletionExample)
        assert without.prompt.endswith("request.\n\n### Instruction:\nI" + tail)
        assert without.completion == "O"


def test_braces_of_the_data_are_not_fields(tmp_path: Path) -> None:
    record = {"instruction": "{output} {0}", "input": "{", "output": "}"}
    example = one(tmp_path, record)
    assert isinstance(example, CompletionExample)
    assert "{output} {0}\n\n### Input:\n{\n" in example.prompt
    assert example.completion == "}"


def test_chat_messages_keep_other_keys_and_lose_nulls(tmp_path: Path) -> None:
    call = [{"function": {"name": "f", "arguments": {}}}]
    messages = [
        {"role": "user", "content": "hi", "name": None},
        {"role": "assistant", "content": None, "tool_calls": call},
        {"role": "tool", "content": "42", "name": "f"},
    ]
    assert one(tmp_path, {"messages": messages}) == ChatExample(
        [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "tool_calls": call},
            {"role": "tool", "content": "42", "name": "f"},
        ]
    )


def test_sharegpt_roles(tmp_path: Path) -> None:
    speakers = ["system", "human", "function_call", "observation", "gpt"]
    turns = [{"from": s, "value": s} for s in speakers]
    example = one(tmp_path, {"conversations": turns})
    assert isinstance(example, ChatExample)
    roles = [(m["role"], m["content"]) for m in example.messages]
    expected = ["system", "user", "assistant", "tool", "assistant"]
    assert roles == list(zip(expected, speakers, strict=True))


@pytest.mark.parametrize("tools", [[{"name": "f"}], '[{"name": "f"}]'])
def test_tools_as_list_or_json_text(tmp_path: Path, tools: Any) -> None:
    record = {"messages": [{"role": "user", "content": "u"}], "tools": tools}
    example = one(tmp_path, record)
    assert isinstance(example, ChatExample)
    assert example.tools == [{"name": "f"}]


@pytest.mark.parametrize("tools", [None, "", " ", [], "[]"])
def test_no_tools(tmp_path: Path, tools: Any) -> None:
    example = one(tmp_path, {"messages": [{"role": "user", "content": "u"}], "tools": tools})
    assert isinstance(example, ChatExample)
    assert example.tools is None


# -- telling formats apart -----------------------------------------------------------------------


def test_auto_prefers_what_is_more_than_text(tmp_path: Path) -> None:
    alpaca = {"instruction": "I", "output": "O", "text": "whole"}
    assert isinstance(one(tmp_path, alpaca), CompletionExample)
    chat = {"messages": [{"role": "user", "content": "u"}], "prompt": "u"}
    assert isinstance(one(tmp_path, chat), ChatExample)
    assert one(tmp_path, alpaca, format="text") == TextExample("whole")


def test_columns_map_roles_also_into_nested_records(tmp_path: Path) -> None:
    record = {"question": "q", "answer": "a", "n": [{"in": "x", "out": "y"}]}
    columns = {"prompt": "question", "completion": "answer"}
    assert one(tmp_path, record, columns=columns) == CompletionExample("q", "a")
    columns = {"prompt": "n.0.in", "completion": "n.0.out"}
    assert one(tmp_path, record, columns=columns) == CompletionExample("x", "y")
    dotted = {"a.b": "literal", "a": {"b": "nested"}}
    assert one(tmp_path, dotted, columns={"text": "a.b"}) == TextExample("literal")


def test_unknown_columns_name_the_file_the_columns_and_the_formats(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        build_examples(tmp_path, [{"question": "q", "answer": "a", "choices": ["a"]}])
    message = str(error.value)
    for part in (
        "data.train[0]: cannot tell the format of",
        "a.jsonl: its columns are question, answer, choices;",
        "chat needs messages or conversations, tools?, system?;",
        "completion needs prompt, completion, tools?, system?;",
        "alpaca needs instruction, output, input?, system?, history?;",
        "text needs text;",
        "classification needs text, label, text_pair? (to be named).",
        "Map them: data.train[0].columns: {prompt: question, completion: answer}",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"columns": {"promt": "q"}},
            r"data.train\[0\].columns: promt is not a role .*mean prompt",
        ),
        ({"format": "text", "columns": {"prompt": "q"}}, r"prompt is not a role of format text"),
        (
            {"columns": {"prompt": "question", "completion": "answr"}},
            r"has no column answr; its columns are question, answer; .*Did you mean answer\?",
        ),
        (
            {"columns": {"text": "question", "label": "answer"}},
            r"label is a role of classification; set data.train\[0\].format: classification",
        ),
        (
            {"format": "completion", "columns": {"prompt": "question"}},
            r"has no column completion; .*Set data.train\[0\].columns: \{completion: a_column\}",
        ),
        (
            {"columns": {"prompt": "question", "completion": "more.0.txt"}},
            r"Did you mean more.0.text\? Set data.train\[0\].columns: \{completion: more.0.text\}",
        ),
        ({"format": "chat"}, r"has no column messages; .*chat needs messages or conversations"),
        ({"format": "text", "template": "{question}"}, r"template is for completion and alpaca"),
    ],
)
def test_wrong_settings(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    record: dict[str, Any] = {"question": "q", "answer": "a"}
    if "more" in str(fields):
        record["more"] = [{"text": "t"}]
    with pytest.raises(UserError, match=message):
        build_examples(tmp_path, [record], **fields)


# -- templates -----------------------------------------------------------------------------------


def test_template_of_columns_and_roles(tmp_path: Path) -> None:
    record = {"a": "A", "b": "B", "answer": "c"}
    columns = {"completion": "answer"}
    example = one(tmp_path, record, columns=columns, template="{a} {{x}} {b}{a}\n")
    assert example == CompletionExample("A {x} BA\n", "c")
    columns = {"prompt": "a", "completion": "answer"}
    assert one(tmp_path, record, columns=columns, template="Q: {prompt}") == CompletionExample(
        "Q: A", "c"
    )


def test_template_replaces_the_alpaca_prompt(tmp_path: Path) -> None:
    record = {"instruction": "I", "output": "O"}
    example = one(tmp_path, record, template="{instruction}|{input}|")
    assert example == CompletionExample("I||", "O")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{a", r"data.train\[0\].template: "),
        ("{} {a}", r"a field is \{column\}"),
        ("{a:>5}", r"a field is \{column\}"),
        ("{a!r}", r"a field is \{column\}"),
        ("{b}", r"template: .* has no column b; its columns are a, completion"),
    ],
)
def test_bad_template(tmp_path: Path, template: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_examples(tmp_path, [{"a": "A", "completion": "c"}], template=template)


# -- bad records ---------------------------------------------------------------------------------

GOOD = {"prompt": "p", "completion": "c"}
USER = {"role": "user", "content": "u"}


@pytest.mark.parametrize(
    ("first", "record", "message"),
    [
        (GOOD, {"prompt": "p", "completion": None}, "column completion must be text but is null"),
        (GOOD, {"prompt": 7, "completion": "c"}, "column prompt must be text but is int 7"),
        (
            GOOD,
            {"prompt": "p"},
            r"has no column completion \(has prompt\), but the first record .* format completion",
        ),
        (GOOD, {"text": "t"}, r"has no column prompt .* a source of their own"),
        (GOOD, {"prompt": "\ud83d", "completion": "c"}, "column prompt is not valid Unicode"),
        ({"messages": [USER]}, {"messages": []}, "messages must be a list of at least one"),
        ({"messages": [USER]}, {"messages": "hi"}, "messages must be a list .* but is str 'hi'"),
        ({"messages": [USER]}, {"messages": [USER, "x"]}, "message 2 is str, not an object"),
        (
            {"messages": [USER]},
            {"messages": [{"content": "u"}]},
            "message 1 has no role; .*content",
        ),
        (
            {"messages": [USER]},
            {"messages": [USER, {"role": "assistant", "content": None}]},
            r"message 2 \(assistant\): content must be text but is null or missing",
        ),
        (
            {"messages": [USER]},
            {"messages": [{"role": "user", "content": ["part"]}]},
            r"message 1 \(user\): content must be text but is list",
        ),
        (
            {"messages": [USER]},
            {"messages": [{"from": "robot", "value": "x"}]},
            "message 1 is from 'robot'; known are assistant, chatgpt",
        ),
        ({"messages": [USER]}, {"messages": [USER], "tools": "{"}, "tools is not valid JSON"),
        ({"messages": [USER]}, {"messages": [USER], "tools": {"a": 1}}, "tools must be a list"),
    ],
)
def test_bad_record_is_named_by_file_and_number(
    tmp_path: Path, first: dict[str, Any], record: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=rf"a\.jsonl, record 2[:, ].*{message}"):
        build_examples(tmp_path, [first, record])


# -- columns that mean something -----------------------------------------------------------------

TURNS = [USER, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "p", "completion": "c", "label": False}, "column label is False: .*KTO"),
        ({"messages": TURNS, "label": False}, "column label is False: .*KTO"),
        (
            {"conversations": [USER], "chosen": {"role": "assistant", "content": "a"}},
            r"columns: \{prompt: conversations, completion: chosen\}",
        ),
        ({"messages": TURNS, "images": ["a.png"]}, "column images holds images"),
        ({"text": "t", "audio": {"path": "a.wav"}}, "column audio holds images, audio"),
        ({"messages": TURNS, "weight": 0.5}, "column weight is 0.5"),
        ({"text": "t", "weight": 2}, "column weight is 2, .* set it to 0 or 1"),
        ({"messages": TURNS, "loss_mask": "0.3"}, "column loss_mask is '0.3'"),
        ({"prompt": "p", "completion": "c", "system": "s"}, "system would be missing"),
        (
            {"prompt": "p", "completion": "c", "tools": [{"name": "f"}]},
            "tools is for conversations",
        ),
        ({"messages": TURNS, "history": [["a", "b"]]}, "history would be missing"),
        ({"instruction": "i", "output": "o", "context": "c"}, r"map it .*\{input: context\}"),
        ({"messages": TURNS, "system_prompt": "s"}, r"map it .*\{system: system_prompt\}"),
        (
            {"instruction": "i", "output": "o", "system_prompt": "s"},
            r"map it .*\{system: system_prompt\}, or write it with",
        ),
    ],
)
def test_a_column_that_means_something_is_refused(
    tmp_path: Path, record: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=rf"a.jsonl, record 1: .*{message}"):
        build_examples(tmp_path, [record])
    means = [
        "label",
        "images",
        "audio",
        "weight",
        "loss_mask",
        "system",
        "tools",
        "history",
        "context",
        "system_prompt",
    ]
    assert len(build_examples(tmp_path, [record], ignore=[*means, "chosen"])) == 1


def test_what_a_message_says_to_map_is_read(tmp_path: Path) -> None:
    system = {"columns": {"system": "system_prompt"}}
    expected = ChatExample([{"role": "system", "content": "s"}, *TURNS])
    assert one(tmp_path, {"messages": TURNS, "system_prompt": "s"}, **system) == expected
    alpaca = {"instruction": "i", "output": "o"}
    read = one(tmp_path, {**alpaca, "system_prompt": "s"}, **system)
    assert isinstance(read, CompletionExample) and read.prompt.startswith("s\n\n### Instruction")
    read = one(tmp_path, {**alpaca, "context": "c"}, columns={"input": "context"})
    assert isinstance(read, CompletionExample) and "### Input:\nc\n" in read.prompt


def test_system_column_text_parts_json_text_and_conversational_completion(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "u"}]
    expected = ChatExample([{"role": "system", "content": "s"}, *TURNS])
    messages = [{"role": "user", "content": parts}, TURNS[1]]
    assert one(tmp_path, {"messages": messages, "system": "s"}) == expected
    assert one(tmp_path, {"messages": json.dumps(TURNS), "system": ""}) == ChatExample(TURNS)
    for answer in (TURNS[1:], TURNS[1]):
        assert one(tmp_path, {"prompt": [USER], "completion": answer}) == ChatExample(TURNS)
    image = [*parts, {"type": "image_url", "image_url": {"url": "x"}}]
    with pytest.raises(UserError, match=r"message 1 \(user\): .*part 2 of type image_url"):
        one(tmp_path, {"messages": [{"role": "user", "content": image}]})
    record = {"prompt": [USER], "completion": TURNS[1], "system": "s", "tools": [{"name": "f"}]}
    assert one(tmp_path, record) == ChatExample(expected.messages, [{"name": "f"}])
    assert one(tmp_path, record, ignore=["system", "tools"]) == ChatExample(TURNS)
    with pytest.raises(UserError, match="messages is not valid JSON"):
        one(tmp_path, {"messages": "[{"})
    with pytest.raises(UserError, match="record 2 holds messages where earlier"):
        build_examples(tmp_path, [GOOD, {"prompt": [USER], "completion": TURNS[1:]}])
