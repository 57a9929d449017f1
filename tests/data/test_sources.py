from pathlib import Path
from typing import Any

import pytest

from dist_peft.core.config.run import DataSource
from dist_peft.core.errors import UserError
from dist_peft.data.examples import ChatExample
from dist_peft.data.files import open_source
from dist_peft.data.sources import read_examples
from tests.support.data_files import build_examples, write_jsonl

KEY = "data.train[0]"
GOOD = {"prompt": "p", "completion": "c"}
USER = {"role": "user", "content": "u"}
TURNS = [USER, {"role": "assistant", "content": "a"}]


def test_no_records(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data.train\[0\]: .*a.jsonl holds no records"):
        build_examples(tmp_path, [])


# -- records that are left out -------------------------------------------------------------------

BLANK_CHAT = {"messages": [USER, {"role": "assistant", "content": " "}]}


@pytest.mark.parametrize(
    "record", [{"prompt": "p", "completion": " "}, {"text": ""}, {"text": "\n"}, BLANK_CHAT]
)
def test_nothing_but_empty_texts_is_refused(tmp_path: Path, record: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"all 2 records of .*a.jsonl have an empty text"):
        build_examples(tmp_path, [record, record])


def left(tmp_path: Path, records: list[Any], **fields: Any) -> tuple[list[int], list[str]]:
    """Numbers of the records that are left, and notes."""
    source = DataSource(path=str(write_jsonl(tmp_path / "a.jsonl", records)), **fields)
    notes: list[str] = []
    found = read_examples(source, open_source(source, KEY), KEY, notes)
    return [place.number for place, _ in found], notes


@pytest.mark.parametrize(
    ("record", "blank"),
    [
        ({"prompt": "p", "completion": "c"}, {"prompt": "p", "completion": "\n"}),
        ({"instruction": "i", "output": "o"}, {"instruction": "i", "output": ""}),
        ({"text": "t"}, {"text": "  "}),
        ({"messages": TURNS}, BLANK_CHAT),
        (
            {"prompt": [*TURNS, USER], "completion": TURNS[1]},
            {"prompt": [*TURNS, USER], "completion": {"role": "assistant", "content": ""}},
        ),
    ],
)
def test_blank_records_are_left_out_and_counted(
    tmp_path: Path, record: dict[str, Any], blank: dict[str, Any]
) -> None:
    numbers, notes = left(tmp_path, [record, blank, record, blank])
    assert numbers == [1, 3]
    assert notes[0] == (
        "left out 2 of 4 records, which have an empty text or completion; the first is "
        f"{tmp_path}/a.jsonl, record 2"
    )


@pytest.mark.parametrize(
    "says",
    [
        {"weight": 0},
        {"weight": 0.0},
        {"train": False},
        {"loss_mask": 0},
        {"trainable": "false"},
        {"sample_weight": "0"},
    ],
)
@pytest.mark.parametrize("record", [{"text": "t"}, GOOD, {"messages": TURNS}])
def test_records_that_say_so_are_left_out(
    tmp_path: Path, says: dict[str, Any], record: dict[str, Any]
) -> None:
    (column,) = says
    numbers, notes = left(tmp_path, [record, {**record, **says}, {**record, column: 1}])
    assert numbers == [1, 3]
    (note,) = notes
    assert note.startswith(f"left out 1 of 3 records, which say not to train on them ({column}: ")
    assert left(tmp_path, [{**record, **says}], ignore=[column])[0] == [1]
    with pytest.raises(
        UserError, match=r"all 1 records of .*say not to train on them .*nothing is"
    ):
        build_examples(tmp_path, [{**record, **says}])


def test_weights_of_classification(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"format": "classification", "labels": ["a", "b"]}
    record = {"text": "t", "label": "a"}
    assert left(tmp_path, [record, {**record, "weight": 0}], **settings)[0] == [1]
    with pytest.raises(UserError, match=r"record 1: column weight is 0.5, but a record"):
        left(tmp_path, [{**record, "weight": 0.5}], **settings)


def test_a_blank_turn_of_a_conversation_does_not_contribute(tmp_path: Path) -> None:
    blank = {"role": "assistant", "content": "", "weight": 1}
    thought = {"role": "assistant", "content": "", "reasoning_content": "hm"}
    record = {"messages": [USER, blank, USER, thought, USER, TURNS[1]]}
    source = DataSource(path=str(write_jsonl(tmp_path / "a.jsonl", [record])))
    notes: list[str] = []
    ((_, example),) = read_examples(source, open_source(source, KEY), KEY, notes)
    excluded = {"role": "assistant", "content": "", "train": False}
    assert example == ChatExample([USER, excluded, USER, thought, USER, TURNS[1]])
    assert notes == [
        "1 assistant turns are empty and do not contribute to the loss; the first is in "
        f"{tmp_path}/a.jsonl, record 1"
    ]
