import json
from pathlib import Path
from typing import Any

import pytest

from dist_peft.core.config.run import DataSource
from dist_peft.core.errors import UserError
from dist_peft.data import record_blocks, tokenizing
from dist_peft.data.tokens import load_token_documents
from tests.support.data_files import byte_tokenizer, data_config, write_jsonl

USER = {"role": "user", "content": "u"}
BLANK = {"role": "assistant", "content": ""}


def make_chat(number: int) -> dict[str, Any]:
    answer = {"role": "assistant", "content": f"é {number}"}
    turns = [USER, BLANK, USER, answer] if number % 3 else [USER, answer]
    return {"messages": turns, "id": number, **({"train": False} if number == 25 else {})}


RECORDS: dict[str, list[dict[str, Any]]] = {
    "text": [{"text": f"t {i}" * (i % 5), f"column {i % 21 // 20}": i} for i in range(60)],
    "completion": [{"prompt": f"p{i}", "completion": "cd" * i} for i in range(60)],
    "alpaca": [
        {"instruction": "i", "output": "o", "history": [["a", f"b{i}"]] * (i % 3)}
        for i in range(40)
    ],
    "chat": [make_chat(i) for i in range(60)],
    "classification": [{"text": f"ab {i}" * i, "label": "yn"[i % 2]} for i in range(1, 40)],
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 8 records, and processes after the first with a document."""
    monkeypatch.setattr(record_blocks, "BLOCK_RECORDS", 8)
    monkeypatch.setattr(tokenizing, "_SERIAL_SECONDS", 0.0)


class Loads:
    """Tokenizes a file with any number of processes, each time from the start."""

    def __init__(self, tmp_path: Path) -> None:
        self.directory = tmp_path
        self.file = tmp_path / "a.jsonl"
        self.tokenizer = byte_tokenizer()

    def read_entry(self, processes: int, **source: Any) -> dict[str, bytes]:
        cache = self.directory / f"cache {processes}"
        config = data_config(cache, workers=processes, **source.pop("config", {}))
        load_token_documents(
            config, DataSource(path=str(self.file), **source), self.tokenizer, "data.train[0]"
        )
        (entry,) = (cache / "tokens").iterdir()
        return {path.name: path.read_bytes() for path in entry.iterdir()}

    def read_error(self, processes: int) -> str:
        with pytest.raises(UserError) as found:
            self.read_entry(processes)
        assert not list((self.directory / f"cache {processes}" / "tokens").iterdir())
        return str(found.value)


@pytest.mark.parametrize("kind", RECORDS)
def test_entry_has_the_same_bytes_for_any_number_of_processes(tmp_path: Path, kind: str) -> None:
    source: dict[str, Any] = {}
    if kind == "classification":
        options = {"packing": False, "seq_len": 16, "too_long": "truncate"}
        source = {"format": kind, "labels": ["y", "n"], "config": options}
    loads = Loads(tmp_path)
    write_jsonl(loads.file, RECORDS[kind])
    alone = loads.read_entry(1, **dict(source))
    assert loads.read_entry(3, **dict(source)) == alone
    notes = json.loads(alone["meta.json"])["notes"]
    assert len(notes) == {"text": 2, "completion": 1, "alpaca": 0, "chat": 4}.get(kind, 1), notes


def test_processes_are_used_only_for_a_large_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    run = tokenizing.map_in_processes

    def count(*args: Any) -> Any:
        calls.append(args[2])
        return run(*args)

    monkeypatch.setattr(tokenizing, "map_in_processes", count)
    loads = Loads(tmp_path)
    write_jsonl(loads.file, RECORDS["text"])
    loads.read_entry(2)
    loads.read_entry(1)
    monkeypatch.setattr(tokenizing, "_SERIAL_SECONDS", 60.0)
    loads.read_entry(5)
    assert calls == [2]


def test_the_first_bad_record_is_named(tmp_path: Path) -> None:
    """Of several in different chunks, and of lines that are no JSON."""
    loads = Loads(tmp_path)
    good = [{"text": "t"}] * 20
    write_jsonl(loads.file, [*good, {"text": 5}, *good, {"text": None}, *good])
    assert loads.read_error(3) == loads.read_error(1)
    assert "record 21: column text must be text but is int 5" in loads.read_error(3)
    write_jsonl(loads.file, good)
    with loads.file.open("ab") as file:
        file.write(b'{"text": "\n' + b'{"text": "a"}\n' * 30)
    assert loads.read_error(3) == loads.read_error(1)
    assert "line 21 is not valid JSON" in loads.read_error(3)


def test_limit_and_several_files(tmp_path: Path) -> None:
    loads = Loads(tmp_path)
    loads.file = tmp_path / "files"
    loads.file.mkdir()
    for name in "ab":
        write_jsonl(loads.file / f"{name}.jsonl", RECORDS["text"][:30])
    with (loads.file / "b.jsonl").open("a") as file:
        file.write("broken\n")
    assert loads.read_entry(3, limit=60) == loads.read_entry(1, limit=60)
    assert "b.jsonl, line 31 is not valid JSON" in loads.read_error(2)
