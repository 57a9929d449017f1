"""Any data file and conversation: the records that are there, or a ``UserError`` with the place."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_peft.core.config.run import DataSource
from dist_peft.data.files import open_source
from dist_peft.data.readers import read_record_file
from dist_peft.data.sources import read_examples
from dist_peft.data.tokens import ExampleEncoder
from tests.fuzz.budget import fuzz, try_input
from tests.fuzz.strategies import damaged_bytes, damaged_tree, values
from tests.support.data_files import byte_tokenizer

CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
CHAT = {
    "messages": [
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "q"}]},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "name": "f", "content": "1", "tool_call_id": "1"},
        {"role": "assistant", "content": "a", "weight": 1},
    ],
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
}
SHAREGPT = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
ALPACA = {"instruction": "i", "input": "x", "output": "o", "history": [["q", "a"]], "system": "s"}
WORDS = (
    *("messages", "role", "content", "user", "assistant", "system", "tool", "tool_calls", "weight"),
    *("conversations", "from", "value", "human", "gpt", "instruction", "input", "output", "text"),
    *("prompt", "completion", "tools", "train", "label", "type", "function", "name", "arguments"),
)
LINES = b'{"prompt": "q", "completion": "a"}\n{"prompt": "\xc3\xa9", "completion": "a"}\n'


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "x.jsonl"


@pytest.fixture(scope="module")
def encoder() -> ExampleEncoder:
    return ExampleEncoder(byte_tokenizer(), "completion", "warn")


def encode(file: Path, encoder: ExampleEncoder) -> int:
    """Read all examples and tokenize them; give their number of tokens."""
    source = DataSource(path=str(file))
    total = 0
    for place, example in read_examples(source, open_source(source, "data.train[0]"), "data.train"):
        for tokens, mask in encoder.encode_examples([example], [place]):
            assert len(tokens) == len(mask)
            total += len(tokens)
    return total


def test_undamaged(file: Path, encoder: ExampleEncoder) -> None:
    for record in (CHAT, SHAREGPT, ALPACA, {"text": "t"}):
        file.write_text(json.dumps(record))
        assert encode(file, encoder) > 1


@fuzz
@given(content=damaged_bytes(LINES) | st.binary(max_size=40))
def test_jsonl(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    found, refusal = try_input(lambda: list(read_record_file(file)))
    if refusal is not None:
        assert str(file) in refusal
        return
    lines = [json.loads(line) for line in content.decode("utf-8-sig").split("\n") if line.strip()]
    assert repr(found) == repr([{"text": x} if isinstance(x, str) else x for x in lines])


@fuzz
@given(
    records=st.lists(
        st.one_of(*(damaged_tree(tree, WORDS) for tree in (CHAT, CHAT, SHAREGPT, ALPACA)))
        | values(*WORDS),
        min_size=1,
        max_size=2,
    )
)
def test_chat(file: Path, encoder: ExampleEncoder, records: list[Any]) -> None:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    _, refusal = try_input(lambda: encode(file, encoder))
    assert refusal is None or "x.jsonl" in refusal or "data.train" in refusal


@fuzz
@given(content=damaged_bytes(b'a,b\n1,"2\n3"\n4,5\n') | st.text(max_size=30).map(str.encode))
def test_csv(file: Path, content: bytes) -> None:
    table = file.with_suffix(".csv")
    table.write_bytes(content)
    found, refusal = try_input(lambda: list(read_record_file(table)))
    if refusal is not None:
        assert str(table) in refusal
        return
    assert all(isinstance(value, str) for record in found for value in record.values())
