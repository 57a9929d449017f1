from typing import Any

import pytest

from dist_peft.data.blank_turns import BlankTurns, excluded_turn, is_blank_turn
from dist_peft.data.files import Place


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
    turns = BlankTurns()
    (found,) = turns.excluded([message], Place("a.jsonl", 7))
    assert found == (excluded_turn(message) if blank else message)
    assert len(turns.notes) == blank
    assert all("record 7" in note for note in turns.notes)


def test_an_excluded_turn_says_so_once() -> None:
    message = {"role": "assistant", "content": "a", "weight": 1, "loss_mask": 1}
    assert excluded_turn(message) == {"role": "assistant", "content": "a", "train": False}
