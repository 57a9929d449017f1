from typing import Any

import pytest

from dist_peft.core.errors import UserError
from dist_peft.data.files import RecordPlace
from dist_peft.data.left_out import ExcludedRecords, find_excluding_column, is_zero_weight


@pytest.mark.parametrize("value", [0, 0.0, False, "0", " False ", "no"])
def test_zero_weights(value: Any) -> None:
    assert is_zero_weight(value)
    assert find_excluding_column({"text": "t", "train": value}, {"text"}) == "train"
    assert find_excluding_column({"text": "t", "train": value}, {"train"}) is None


@pytest.mark.parametrize("value", [1, True, 0.5, "1", "", None, [], [0], float("nan")])
def test_other_weights(value: Any) -> None:
    assert not is_zero_weight(value)


def test_reasons_are_counted_and_the_first_place_is_named() -> None:
    left_out = ExcludedRecords("a.jsonl", "data.train[0]")
    for _ in range(4):
        left_out.count_record()
    for number, reason in ((1, "are red"), (3, "are blue"), (4, "are red")):
        left_out.count_excluded(reason, RecordPlace("a.jsonl", number))
    left_out.refuse_if_all()
    assert left_out.user_notes == [
        "left out 2 of 4 records, which are red; the first is a.jsonl, record 1",
        "left out 1 of 4 records, which are blue; the first is a.jsonl, record 3",
    ]
    left_out.all_records.clear()
    left_out.all_records.count("", number=3)
    with pytest.raises(
        UserError,
        match=r"of the 3 records of a.jsonl 2 are red \(the first .*, record 1\), 1 are blue",
    ):
        left_out.refuse_if_all()


def test_no_records() -> None:
    with pytest.raises(UserError, match=r"data.train\[0\]: a.jsonl holds no records"):
        ExcludedRecords("a.jsonl", "data.train[0]").refuse_if_all()
