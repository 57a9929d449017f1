"""Question and answer need no mapping, unless something else may belong to the text."""

from pathlib import Path
from typing import Any

import pytest

from dist_peft.core.config.run import DataSource
from dist_peft.core.errors import UserError
from dist_peft.data.column_guess import guess_columns
from dist_peft.data.documents import load_sequence_set
from dist_peft.data.examples import CompletionExample
from tests.support.data_files import build_examples, byte_tokenizer, data_config, write_jsonl


@pytest.mark.parametrize(
    ("record", "columns"),
    [
        ({"question": "q", "answer": "a"}, {"prompt": "question", "completion": "answer"}),
        ({"Question": "q", "Answer": "a", "ID": 3}, {"prompt": "Question", "completion": "Answer"}),
        (
            {"problem": "q", "solution": "a", "level": "5", "type": "Algebra"},
            {"prompt": "problem", "completion": "solution"},
        ),
        ({"article": "t", "highlights": "h"}, {"prompt": "article", "completion": "highlights"}),
        ({"instruction": "i", "input": "x", "response": "r"}, {"output": "response"}),
        ({"instruction": "i", "response": "r", "answer": "a"}, {}),
        ({"Instruction": "i", "response": "r"}, {}),
        ({"question": "q", "choices": ["a", "b"], "answer": "a"}, {}),
        ({"question": "q", "context": "c", "answer": "a"}, {}),
        ({"question": "q", "answer": 3}, {}),
        ({"query": "q", "response": "r", "original_question": "o"}, {}),
        ({"question": "q", "response": "r", "label": False}, {}),
        ({"a": "q", "b": "r"}, {}),
    ],
)
def test_only_names_that_leave_one_reading(record: dict[str, Any], columns: dict[str, str]) -> None:
    assert guess_columns(DataSource(path="a"), record) == columns


@pytest.mark.parametrize(
    "settings",
    [
        {"format": "chat"},
        {"format": "text"},
        {"template": "{question}"},
        {"columns": {"text": "a"}},
    ],
)
def test_settings_are_not_overruled(settings: dict[str, Any]) -> None:
    source = DataSource.model_validate({"path": "a", **settings})
    assert guess_columns(source, {"question": "q", "answer": "a"}) == {}


def test_ignored_columns_do_not_count() -> None:
    record = {"question": "q", "answer": "a", "choices": []}
    assert guess_columns(DataSource(path="a", ignore=["choices"]), record)


def test_it_is_read_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    records = [{"question": "1 + 1? ", "answer": "two"}, {"question": "1 + 2? ", "answer": "three"}]
    assert build_examples(tmp_path, records)[1] == CompletionExample("1 + 2? ", "three")
    source = DataSource(path=str(write_jsonl(tmp_path / "b.jsonl", records)))
    load_sequence_set(data_config(tmp_path / "c"), [source], byte_tokenizer(), name="train")
    assert "data.train[0]: by their names, column question as prompt and answer as completion" in (
        caplog.text
    )
    assert "columns: {prompt: question, completion: answer}" in caplog.text


def test_later_records_need_the_columns(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="record 2 has no column answer"):
        build_examples(tmp_path, [{"question": "q", "answer": "a"}, {"question": "q"}])
