"""data.val_split: no record on both sides, the same split whatever else changes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_peft.core.config.io import parse_config
from dist_peft.core.config.run import DataSource
from dist_peft.core.errors import UserError
from dist_peft.data.classification import load_labelled_sequences
from dist_peft.data.documents import load_sequence_set, load_sequence_sets
from dist_peft.data.held_out_split import count_held_out, select_split_side
from tests.support.data_files import byte_tokenizer, data_config, documents, write_jsonl

Tree = dict[str, Any]


def make_records(count: int, first: int = 0) -> list[Tree]:
    return [{"prompt": f"p{i} ", "completion": f"one{i}"} for i in range(first, first + count)]


def read_places(config: Any, sources: list[DataSource], name: str) -> set[tuple[int, int]]:
    rows = load_sequence_set(config, sources, byte_tokenizer(), name=name)
    records = [place for row in range(len(rows)) for place in rows.list_records(row)]
    assert len(records) == len(set(records))
    return {(source, place.number) for source, place in records}


def test_sides_are_disjoint_whole_and_independent_of_the_sequences(tmp_path: Path) -> None:
    sources = [
        DataSource(path=str(write_jsonl(tmp_path / f"{n}.jsonl", make_records(40, first))))
        for n, first in (("a", 0), ("b", 100))
    ]
    found = []
    for settings in ({"seq_len": 64}, {"seq_len": 32, "packing": False}):
        config = data_config(tmp_path / "cache", val_split=0.1, **settings)
        sides = [read_places(config, sources, name) for name in ("train", "eval")]
        assert not sides[0] & sides[1]
        assert sides[0] | sides[1] == {(s, n) for s in (0, 1) for n in range(1, 41)}
        assert [sum(s == source for s, _ in sides[1]) for source in (0, 1)] == [4, 4]
        found.append(sides[1])
    assert found[0] == found[1]
    assert {n for s, n in found[0] if s == 0} == {n for s, n in found[0] if s == 1}
    apart = load_sequence_sets(config, sources, byte_tokenizer(), name="eval")
    assert [len(rows) for rows in apart] == [4, 4]


def test_another_tokenizer_splits_at_the_same_records() -> None:
    """Keys are of places: contents only say which records are equal."""
    masks = [[0, 1, 1]] * 50
    sides = [
        select_split_side([documents(masks, first=first)], 0.2, "eval")[0] for first in (0, 7000)
    ]
    assert sides[0].sum() == 10 and np.array_equal(*sides)


def test_equal_records_are_on_one_side_in_all_sources(tmp_path: Path) -> None:
    repeated = make_records(10)
    files = [
        write_jsonl(tmp_path / "a.jsonl", [*repeated, *repeated, *make_records(5, 50)]),
        write_jsonl(tmp_path / "b.jsonl", [*make_records(20, 100), *repeated]),
    ]
    sources = [DataSource(path=str(file)) for file in files]
    config = data_config(tmp_path / "cache", val_split=6, packing=False, seq_len=64)
    texts = []
    for name in ("train", "eval"):
        rows = load_sequence_set(config, sources, byte_tokenizer(), name=name)
        texts.append([tuple(rows.get_sequence(i)[0].tolist()) for i in range(len(rows))])
    assert not set(texts[0]) & set(texts[1])
    assert len(texts[0]) + len(texts[1]) == 55 and len(set(texts[1])) < len(texts[1])


def test_variants_follow_their_record_and_are_not_held_out(tmp_path: Path) -> None:
    (tmp_path / "synonyms.txt").write_text("good: fine\n")
    augment = {"kind": "eda", "synonyms": str(tmp_path / "synonyms.txt"), "num_aug": 2}
    file = write_jsonl(
        tmp_path / "a.jsonl", [{"prompt": f"good {i} ", "completion": "good"} for i in range(8)]
    )
    source = DataSource.model_validate({"path": str(file), "augment": augment})
    config = data_config(tmp_path / "cache", val_split=2, packing=False, seq_len=64)
    train = load_sequence_set(config, [source], byte_tokenizer(), name="train")
    held_out = load_sequence_set(config, [source], byte_tokenizer(), name="eval")
    assert [len(train), len(held_out)] == [6 * 3, 2] and len(held_out.epoch_ranges) == 1
    numbers = [
        {place.number for row in range(len(rows)) for _, place in rows.list_records(row)}
        for rows in (train, held_out)
    ]
    assert len(numbers[0]) == 6 and not numbers[0] & numbers[1]
    plain = load_sequence_set(config, [source.without_variants()], byte_tokenizer(), name="eval")
    text = [byte_tokenizer().decode(held_out.get_sequence(i)[0]) for i in range(2)]
    assert text == [byte_tokenizer().decode(plain.get_sequence(i)[0]) for i in range(2)]
    assert all(f"good {n - 1} good" in t for n, t in zip(sorted(numbers[1]), text, strict=True))


def test_labelled_records_keep_their_labels(tmp_path: Path) -> None:
    records = [{"text": f"t{i}", "label": ("no", "yes")[i % 3 == 0]} for i in range(30)]
    file = write_jsonl(tmp_path / "a.jsonl", records)
    source = {"path": str(file), "format": "classification", "labels": ["no", "yes"]}
    config = data_config(tmp_path / "cache", val_split=0.2, train=[source])
    found: list[dict[int, int]] = []
    for name in ("train", "eval"):
        (rows,) = load_labelled_sequences(config, config.held_out, byte_tokenizer(), name=name)
        found.append(
            {
                rows.list_records(i)[0][1].number: int(rows.get_sequence(i)[1][0])
                for i in range(len(rows))
            }
        )
    assert [len(each) for each in found] == [24, 6] and not found[0].keys() & found[1].keys()
    assert found[0] | found[1] == {i + 1: int(i % 3 == 0) for i in range(30)}


def test_counts_of_held_out_records() -> None:
    assert count_held_out(7473, 0.05, "k") == 374 and count_held_out(3, 0.01, "k") == 1
    assert count_held_out(10, 9, "k") == 9
    for records, part in ((1, 0.5), (10, 10), (2, 0.9)):
        with pytest.raises(UserError, match=r"would hold out .* records of data"):
            count_held_out(records, part, "data.train[0]")


def test_repeated_records_only_are_refused(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", make_records(1) * 10)
    config = data_config(tmp_path / "cache", val_split=0.2)
    with pytest.raises(UserError, match="equal ones are kept on one side"):
        load_sequence_set(config, [DataSource(path=str(file))], byte_tokenizer(), name="train")
    other = write_jsonl(tmp_path / "b.jsonl", [*make_records(1) * 2, *make_records(9, 1)])
    pair = [DataSource(path=str(other)), DataSource(path=str(other))]
    assert len(load_sequence_set(config, pair, byte_tokenizer(), name="eval")) == 1
    few = write_jsonl(tmp_path / "c.jsonl", make_records(2))
    sources = [DataSource(path=str(few)), DataSource(path=str(few)), DataSource(path=str(other))]
    config = data_config(tmp_path / "cache", val_split=1)
    load_sequence_set(config, sources, byte_tokenizer(), name="train")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"eval": ["b"], "val_split": 0.1}, "give one of them"),
        ({"val_split": 1.5}, "neither a share below 1 nor a number"),
        ({"val_split": -0.1}, "greater than or equal to 0"),
    ],
)
def test_wrong_settings(data: Tree, words: str) -> None:
    with pytest.raises(UserError, match=words):
        parse_config({"base": {"path": "b"}, "data": {"train": ["a"], **data}})
