from typing import Any

import pytest

from dist_peft.data.blank_turns import BlankTurnFilter, exclude_turn, is_blank_turn
from dist_peft.data.files import RecordPlace


@pytest.mark.parametrize(
    ("message", "blank"),
    [
        ({"role": "assistant", "content": " \n"}, True),
        ({"role": "assistant", "name": "bot", "content": "", "weight": 1}, True),
        ({"role": "assistant", "content": "a"}, False),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}, False),
        ({"role": "assistant", "content": "", "reasoning_content": "hm"}, False),
        ({"role": "user", "content": ""}, False),
    ],
)
def test_blank_turns(message: dict[str, Any], blank: bool) -> None:
    assert is_blank_turn(message) is blank
    turns = BlankTurnFilter()
    (found,) = turns.exclude_blank_turns([message], RecordPlace("a.jsonl", 7))
    assert found == (exclude_turn(message) if blank else message)
    assert len(turns.user_notes) == blank
    assert all("record 7" in note for note in turns.user_notes)


def test_an_excluded_turn_says_so_once() -> None:
    message = {"role": "assistant", "content": "a", "weight": 1, "loss_mask": 1}
    assert exclude_turn(message) == {"role": "assistant", "content": "a", "train": False}
