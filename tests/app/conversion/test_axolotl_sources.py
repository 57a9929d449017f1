"""axolotl's entries of data sets: types are mapped by their meaning, never by name."""

from typing import Any

import pytest

from dist_peft.app.conversion.axolotl_sources import convert_source_list
from dist_peft.app.conversion.config_draft import ConfigDraft


@pytest.mark.parametrize(
    ("entry", "sources"),
    [
        ({"path": "a.jsonl"}, [{"path": "a.jsonl"}]),
        ({"path": "a", "type": "alpaca"}, [{"path": "a", "format": "alpaca"}]),
        ({"path": "a", "type": "alpaca:chat"}, [{"path": "a", "format": "alpaca"}]),
        ({"path": "a", "type": "completion"}, [{"path": "a", "format": "text"}]),
        (
            {"path": "a", "type": "completion", "field": "body"},
            [{"path": "a", "format": "text", "columns": {"text": "body"}}],
        ),
        (
            {"path": "a", "type": "gpteacher"},
            [{"path": "a", "format": "alpaca", "columns": {"output": "response"}}],
        ),
        ({"path": "a", "type": "sharegpt.load_role"}, [{"path": "a", "format": "chat"}]),
        (
            {"path": "a", "type": "chat_template", "field_messages": "turns"},
            [{"path": "a", "format": "chat", "columns": {"messages": "turns"}}],
        ),
        (
            {
                "path": "a",
                "type": "chat_template",
                "field_messages": "conversations",
                "message_property_mappings": {"role": "from", "content": "value"},
                "roles": {"assistant": ["gpt"], "user": ["human", "user"]},
                "roles_to_train": ["assistant"],
                "chat_template": "tokenizer_default",
                "train_on_eos": "turn",
            },
            [{"path": "a", "format": "chat"}],
        ),
        (
            {"path": "json", "data_files": ["b.jsonl", "c.jsonl"], "ds_type": "json"},
            [{"path": "b.jsonl"}, {"path": "c.jsonl"}],
        ),
        (
            {"path": "org/set", "name": "main", "split": "test"},
            [{"path": "org/set:main", "split": "test"}],
        ),
        ({"path": "a", "split": "train"}, [{"path": "a"}]),
        (
            {
                "path": "a",
                "type": {
                    "field_instruction": "q",
                    "field_output": "a",
                    "field_input": "",
                    "format": "Q: {instruction}\nA:",
                },
            },
            [
                {
                    "path": "a",
                    "format": "alpaca",
                    "columns": {"instruction": "q", "output": "a"},
                    "template": "Q: {q}\nA:",
                }
            ],
        ),
    ],
)
def test_entries(entry: dict[str, Any], sources: list[dict[str, Any]]) -> None:
    draft = ConfigDraft()
    assert convert_source_list([entry], "datasets", draft) == sources
    assert draft.unmatched == []


def test_what_is_listed() -> None:
    draft = ConfigDraft()
    entries = [
        "a.jsonl",
        {"path": "org/b", "type": "input_output", "data_files": "x.jsonl", "shards": 4},
        {
            "path": "c",
            "type": "chat_template",
            "roles_to_train": ["user"],
            "roles": {"user": ["me"]},
        },
        {"path": "d", "type": {"no_input_format": "x", "format": "y"}},
    ]
    sources = convert_source_list(entries, "datasets", draft)
    assert [source["path"] for source in sources] == ["a.jsonl", "org/b", "c", "d"]
    assert [line.split(":")[0] for line in draft.unmatched] == [
        "datasets[1].type",
        "datasets[1].shards",
        "datasets[1].data_files",
        "datasets[2].roles_to_train",
        "datasets[2].roles",
        "datasets[3].type.no_input_format",
    ]
