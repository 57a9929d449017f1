"""Variants of records: which texts, which draws, the cache, and what is refused."""

import sys
from pathlib import Path
from typing import Any

import pytest

from dist_peft.core.config.run import DataSource
from dist_peft.core.errors import UserError
from dist_peft.core.seeds import RandomDraws
from dist_peft.data import record_blocks, tokenizing
from dist_peft.data.augmenting import make_record_augmenter
from dist_peft.data.files import open_source, read_records
from dist_peft.data.record_blocks import Record
from dist_peft.data.sources import ExampleReader
from dist_peft.data.tokens import load_token_documents
from tests.support.data_files import byte_tokenizer, data_config, write_jsonl

KEY = "data.train[0]"
SHOUT = "def shout(text, rng):\n    return text.upper() + str(rng.randrange(10**9))\n"


def shouting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str = SHOUT) -> dict[str, Any]:
    """A source's ``augment`` that calls ``shout`` of a module in the working directory."""
    module = f"shouting_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{module}.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    monkeypatch.delitem(sys.modules, module, raising=False)
    return {"kind": "function", "function": f"{module}:shout", "num_aug": 2}


def read(
    tmp_path: Path, records: list[Record], augment: dict[str, Any], **source: Any
) -> tuple[list[Any], list[str]]:
    """The examples of a file and the notes."""
    file = write_jsonl(tmp_path / "a.jsonl", records)
    found = DataSource(path=str(file), augment=augment, **source)
    config = data_config(tmp_path / "cache", allow_code=True)
    opened = open_source(found, KEY)
    reader = ExampleReader(found, KEY, make_record_augmenter(config, found, byte_tokenizer(), KEY))
    examples = [example for _, example in reader.build_examples(read_records(opened, None))]
    return examples, reader.finish_source()


MESSAGES = [
    {"role": "system", "content": "sys"},
    {"role": "user", "content": "uno"},
    {"role": "assistant", "content": "answer"},
    {"role": "user", "content": "dos"},
    {"role": "assistant", "content": "last"},
]
FORMATS: dict[str, tuple[Record, dict[str, Any], set[str], set[str]]] = {
    "text": ({"text": "abc"}, {}, {"ABC"}, set()),
    "completion": ({"prompt": "abc", "completion": "xyz"}, {}, {"ABC"}, {"xyz"}),
    "system": (
        {"prompt": "abc", "completion": "xyz", "system": "sss"},
        {"template": "lit {system} {prompt}"},
        {"ABC", "SSS"},
        {"xyz", "lit"},
    ),
    "template": (
        {"a": {"b": "abc"}, "q": "ddd", "completion": "xyz"},
        {"template": "lit {a.b}: {prompt}{completion}", "columns": {"prompt": "q"}},
        {"ABC", "DDD"},
        {"xyz", "lit"},
    ),
    "alpaca": (
        {"instruction": "abc", "input": "ddd", "output": "xyz"},
        {},
        {"ABC", "DDD"},
        {"xyz", "Below is an instruction"},
    ),
    "named fields": (
        {"instruction": "abc", "input": "ddd", "output": "xyz"},
        {"fields": ["output"]},
        {"XYZ"},
        {"abc", "ddd"},
    ),
    "chat": ({"messages": MESSAGES}, {}, {"UNO", "DOS"}, {"sys", "answer", "last"}),
    "completion of messages": (
        {"prompt": MESSAGES[:2], "completion": MESSAGES[2:3]},
        {},
        {"UNO"},
        {"sys", "answer"},
    ),
    "classification": (
        {"text": "abc", "text_pair": "ddd", "label": "yes"},
        {"format": "classification", "labels": ["yes", "no"]},
        {"ABC", "DDD"},
        set(),
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_which_texts_are_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    record, source, changed, kept = FORMATS[name]
    fields = {"fields": source["fields"]} if "fields" in source else {}
    source = {key: value for key, value in source.items() if key != "fields"}
    augment = shouting(tmp_path, monkeypatch) | fields
    (plain, *variants), _ = read(tmp_path, [record], augment, **source)
    assert len(variants) == 2 and variants[0] != variants[1]
    for text in changed:
        assert text not in str(plain)
    for variant in variants:
        for text in changed | kept:
            assert text in str(variant), text
        for text in changed:
            assert text.lower() not in str(variant)
        assert type(variant) is type(plain)
        if name == "classification":
            assert variant.label == plain.label == 0


def make_synonyms(tmp_path: Path, text: str = "ab: cd, ef\nxy: zz\n") -> dict[str, Any]:
    (tmp_path / "synonyms.txt").write_text(text)
    return {"kind": "eda", "synonyms": str(tmp_path / "synonyms.txt"), "num_aug": 2}


def test_variants_depend_on_seed_and_text_alone(tmp_path: Path) -> None:
    augment = make_synonyms(tmp_path) | {"alpha_rs": 0.5}
    records = [{"text": f"ab xy {i} ab one two three"} for i in range(6)]
    first, notes = read(tmp_path, records, augment)
    turned, _ = read(tmp_path, records[::-1], augment)
    split = {e.text for e in first}
    assert split == {e.text for e in turned} and first != turned
    assert [e.text for e in first[::3]] == [r["text"] for r in records]
    assert read(tmp_path, records[3:4], augment)[0] == first[9:12]
    assert read(tmp_path, records, augment | {"seed": 1})[0] != first
    assert not any("augment" in note for note in notes)
    # no word has a synonym, and there is nothing to swap
    only = augment | {"alpha_rs": 0, "p_rd": 0}
    _, notes = read(tmp_path, [{"text": "word"}] * 3, only)
    assert notes == [f"augment has changed none of 3 records; check {KEY}.augment"]
    _, notes = read(tmp_path, [{"text": "word"}, {"text": "ab"}], only | {"alpha_ri": 0})
    assert notes == ["1 of 2 records have a variant that is equal to the record"]


def test_token_dropout_leaves_out_tokens(tmp_path: Path) -> None:
    config = data_config(tmp_path / "cache")
    augment = {"kind": "token_dropout", "p": 0.3, "num_aug": 64}
    source = DataSource(path="unused.jsonl", augment=augment)
    augmenter = make_record_augmenter(config, source, byte_tokenizer(), KEY)
    assert augmenter is not None
    # the byte tokenizer has the tokens bc and de, and three for the bytes of the last character
    text, draws, counts = "abcdef €", RandomDraws(0), [0] * 6
    for _ in range(20):
        for variant in augmenter._augmenter.make_variants(text, draws):
            rest = iter(text)
            assert variant.strip() and all(c in rest for c in variant)
            assert ("b" in variant) == ("c" in variant) and ("d" in variant) == ("e" in variant)
            for place, piece in enumerate(["a", "bc", "de", "f", " ", "€"]):
                counts[place] += piece in variant
    assert all(0.65 < count / 1280 < 0.75 for count in counts), counts
    everything = source.model_copy(
        update={"augment": source.augment.model_copy(update={"p": 0.999})}  # type: ignore[union-attr]
    )
    most = make_record_augmenter(config, everything, byte_tokenizer(), KEY)
    assert most is not None
    assert {len(v) for v in most._augmenter.make_variants("abcd", draws)} <= {1, 2}


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 8 records, and processes after the first with a document."""
    monkeypatch.setattr(record_blocks, "BLOCK_RECORDS", 8)
    monkeypatch.setattr(tokenizing, "_SERIAL_SECONDS", 0.0)


@pytest.mark.usefixtures("small_chunks")
def test_cache_entry_is_that_of_any_number_of_processes(tmp_path: Path) -> None:
    augment = make_synonyms(tmp_path)
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": f"ab {i} xy word"} for i in range(40)])
    entries = []
    for workers in (1, 3):
        config = data_config(tmp_path / f"cache {workers}", workers=workers)
        source = DataSource(path=str(file), augment=augment)
        documents = load_token_documents(config, source, byte_tokenizer(), KEY)
        assert len(documents) == 120
        assert documents.places[:6, 1].tolist() == [1, 1, 1, 2, 2, 2]
        (entry,) = (tmp_path / f"cache {workers}" / "tokens").iterdir()
        entries.append({path.name: path.read_bytes() for path in entry.iterdir()})
    assert entries[0] == entries[1]


def test_cache_is_not_used_after_a_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a setting, of the synonyms, of the function's file; a moved synonym file is no change."""
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": "ab xy word"}])
    config = data_config(tmp_path / "cache", allow_code=True)

    def count_entries(augment: dict[str, Any] | None) -> int:
        source = DataSource(path=str(file), augment=augment)
        load_token_documents(config, source, byte_tokenizer(), KEY)
        return len(list((tmp_path / "cache" / "tokens").iterdir()))

    augment = make_synonyms(tmp_path)
    assert [count_entries(a) for a in (None, augment, augment | {"num_aug": 3})] == [1, 2, 3]
    (tmp_path / "moved.txt").write_text((tmp_path / "synonyms.txt").read_text() + "# remark\n")
    assert count_entries(augment | {"synonyms": str(tmp_path / "moved.txt")}) == 3
    assert count_entries(make_synonyms(tmp_path, "ab: cd\nxy: zz\n")) == 4
    assert count_entries(shouting(tmp_path, monkeypatch)) == 5
    assert count_entries(shouting(tmp_path, monkeypatch)) == 5
    assert count_entries(shouting(tmp_path, monkeypatch, SHOUT + "# changed\n")) == 6


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def shout(text, rng):\n    return 3\n", "shout returned int; it must return a text"),
        ("def shout(text, rng):\n    return ' '\n", "shout returned a blank text"),
        ("def shout(text):\n    return text\n", "shout failed: TypeError"),
        ("def shout(text, rng):\n    return '\\ud800'\n", "is not valid Unicode"),
        ("shout = 3\n", "shout is not a function in module"),
        ("def whisper(text, rng):\n    return text\n", "shout does not exist in module"),
        ("import missing_package\n", "cannot be imported: ModuleNotFoundError"),
        ("def\n", "cannot be imported: SyntaxError"),
    ],
)
def test_functions_that_cannot_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, message: str
) -> None:
    with pytest.raises(UserError) as caught:
        read(tmp_path, [{"text": "abc"}], shouting(tmp_path, monkeypatch, code))
    assert message in str(caught.value) and f"{KEY}.augment" in str(caught.value)
    if "returned" in message or "failed" in message:
        assert "a.jsonl, record 1" in str(caught.value)


def test_function_needs_the_command_line_and_a_file(tmp_path: Path) -> None:
    source = DataSource(path="a", augment={"kind": "function", "function": "math:floor"})
    with pytest.raises(UserError, match=r"is code, .*: add data\.allow_code=true"):
        make_record_augmenter(data_config(tmp_path), source, byte_tokenizer(), KEY)
    config = data_config(tmp_path, allow_code=True)
    with pytest.raises(UserError, match=r"module math has no \.py file"):
        make_record_augmenter(config, source, byte_tokenizer(), KEY)


def test_fields_are_texts_of_the_format(tmp_path: Path) -> None:
    augment = make_synonyms(tmp_path) | {"fields": ["text_pair"]}
    with pytest.raises(
        UserError, match=r"augment\.fields: text_pair is not a text of format text .* use text$"
    ):
        read(tmp_path, [{"text": "abc"}], augment)
