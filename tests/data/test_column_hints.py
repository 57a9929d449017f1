from typing import Any

import pytest

from dist_peft.core.config.run import DataSource
from dist_peft.data.column_hints import (
    suggest_chosen_columns,
    suggest_column_names,
    suggest_columns,
)

USER, ANSWER = {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("record", "hint"),
    [
        ({"question": "q", "answer": "a"}, "columns: {prompt: question, completion: answer}"),
        ({"document": "d", "summary": "s"}, "columns: {prompt: document, completion: summary}"),
        ({"instruction": "i", "input": "", "response": "r"}, "columns: {output: response}"),
        (
            {"id": "1", "instruction": "i", "instances": [{"input": "", "output": "o"}]},
            "columns: {output: a_column}; a column inside another is written instances.0.output",
        ),
        ({"url": "u", "content": "c"}, "columns: {text: content}"),
        ({"sentence1": "a", "sentence2": "b", "label": "x"}, "format: classification"),
        ({"prompt": "p", "chosen": "c", "rejected": "r"}, "{prompt: prompt, completion: chosen}"),
        ({"a": "b"}, "for example k.columns: {prompt: a_column, completion: a_column}"),
    ],
)
def test_hint_names_the_columns_of_the_record(record: dict[str, Any], hint: str) -> None:
    assert hint in suggest_columns(record, "k")


@pytest.mark.parametrize(
    ("record", "columns"),
    [
        (
            {"conversations": [USER], "chosen": ANSWER},
            "{prompt: conversations, completion: chosen}",
        ),
        ({"messages": [USER], "chosen": [ANSWER]}, "{prompt: messages, completion: chosen}"),
        ({"messages": [USER, ANSWER], "chosen": [USER, ANSWER]}, "{messages: chosen}"),
        ({"prompt": "u", "chosen": [USER, ANSWER]}, "{messages: chosen}"),
        ({"prompt": [USER], "chosen": [ANSWER]}, "{prompt: prompt, completion: chosen}"),
        ({"instruction": "i", "input": "x", "chosen": "c"}, "{output: chosen}"),
        ({"question": "q", "chosen": "c"}, "{prompt: question, completion: chosen}"),
        ({"chosen": "Human: u Assistant: a"}, "{text: chosen}"),
    ],
)
def test_columns_of_the_chosen_answers(record: dict[str, Any], columns: str) -> None:
    assert suggest_chosen_columns(record) == columns


def test_a_table_may_lack_its_header_line() -> None:
    source = DataSource(path="a")
    assert "by k.column_names" in suggest_column_names("d/train.tsv", source, "k")
    assert not suggest_column_names("d/train.jsonl", source, "k")
    named = DataSource(path="a", column_names=["p"])
    assert not suggest_column_names("d/train.tsv", named, "k")
