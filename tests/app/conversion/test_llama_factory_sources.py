"""Data sets of LLaMA-Factory by ``dataset_info.json``."""

import json
from pathlib import Path
from typing import Any

import pytest

from dist_peft.app.conversion.config_draft import ConfigDraft
from dist_peft.app.conversion.llama_factory_sources import DatasetTable
from dist_peft.core.errors import UserError

OPENAI_TAGS = {
    "role_tag": "role",
    "content_tag": "content",
    "user_tag": "user",
    "assistant_tag": "assistant",
}
ENTRIES: dict[str, Any] = {
    "plain": {"file_name": "plain.json"},
    "qa": {"file_name": "qa.json", "columns": {"prompt": "q", "response": "a", "query": "input"}},
    "hub": {"hf_hub_url": "org/set", "subset": "main", "split": "test", "num_samples": 5},
    "chat": {"file_name": "chat.json", "formatting": "sharegpt"},
    "openai": {
        "file_name": "openai.json",
        "formatting": "sharegpt",
        "columns": {"messages": "turns", "tools": "functions", "system": "persona"},
        "tags": OPENAI_TAGS,
    },
    "wiki": {"file_name": "wiki.txt", "columns": {"prompt": "body"}},
    "dpo": {"file_name": "dpo.json", "ranking": True},
    "kto": {"file_name": "kto.json", "columns": {"kto_tag": "label"}},
    "strange": {
        "file_name": "s.json",
        "formatting": "sharegpt",
        "folder": "x",
        "columns": {"images": "images"},
        "tags": {"role_tag": "who", "user_tag": "me"},
    },
}


@pytest.fixture
def table(tmp_path: Path) -> DatasetTable:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(ENTRIES))
    (tmp_path / "examples" / "lora").mkdir(parents=True)
    return DatasetTable.find("data", tmp_path / "examples" / "lora")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("plain", {"path": "plain.json", "format": "alpaca"}),
        (
            "qa",
            {
                "path": "qa.json",
                "format": "alpaca",
                "columns": {"instruction": "q", "output": "a"},
            },
        ),
        ("hub", {"path": "org/set:main", "format": "alpaca", "split": "test", "limit": 5}),
        ("chat", {"path": "chat.json", "format": "chat"}),
        (
            "openai",
            {
                "path": "openai.json",
                "format": "chat",
                "columns": {"messages": "turns", "system": "persona", "tools": "functions"},
            },
        ),
    ],
)
def test_entries(table: DatasetTable, name: str, expected: dict[str, Any]) -> None:
    draft = ConfigDraft()
    found = table.convert_source(name, draft, is_text=False, limit=None)
    if "/" not in expected["path"]:
        expected = {**expected, "path": str(table.directory / expected["path"])}
    assert found == {**expected, "name": name}
    assert draft.unmatched == []


def test_pretraining_and_limits(table: DatasetTable) -> None:
    draft = ConfigDraft()
    found = table.convert_source("wiki", draft, is_text=True, limit=7)
    assert found == {
        "path": str(table.directory / "wiki.txt"),
        "name": "wiki",
        "format": "text",
        "columns": {"text": "body"},
        "limit": 7,
    }
    assert table.convert_source("hub", draft, is_text=False, limit=7)["limit"] == 5


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_preferences_are_refused(table: DatasetTable, name: str) -> None:
    with pytest.raises(UserError, match=f"dataset {name} is of preferences"):
        table.convert_source(name, ConfigDraft(), is_text=False, limit=None)


def test_what_is_listed(table: DatasetTable, tmp_path: Path) -> None:
    draft = ConfigDraft()
    table.convert_source("strange", draft, is_text=False, limit=None)
    assert [line.split(" -- ")[0] for line in draft.unmatched] == [
        "dataset strange: tags: {'role_tag': 'who', 'content_tag': 'value'}",
        "dataset strange: user_tag: me",
        "dataset strange: images: images",
        "dataset strange: folder: x",
    ]
    found = table.convert_source("absent", draft, is_text=False, limit=3)
    assert found == {"path": str(table.directory / "absent.json"), "name": "absent", "limit": 3}
    assert "no description in" in draft.unmatched[-1]
    empty = DatasetTable.find("nowhere", tmp_path)
    assert not empty.is_found and empty.directory == Path("nowhere")


def test_damaged_table(tmp_path: Path) -> None:
    for text, words in (("{", "is no JSON file"), ("[]", "must hold an object of data sets")):
        (tmp_path / "dataset_info.json").write_text(text)
        with pytest.raises(UserError, match=words):
            DatasetTable.find(str(tmp_path), tmp_path)
