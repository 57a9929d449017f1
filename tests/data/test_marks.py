import re

from hypothesis import given, settings
from hypothesis import strategies as st

from dist_peft.data.marks import (
    MARK,
    count_shared_prefix,
    find_position_after_mark,
    make_mark,
    parse_mark_number,
)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.text("ab\n"), st.text("ab\n"))
def test_marks_are_found_and_removed(number: int, before: str, after: str) -> None:
    text = before + make_mark(number) + after
    (found,) = MARK.finditer(text)
    assert parse_mark_number(found) == number
    assert MARK.sub("", text) == before + after
    assert find_position_after_mark(text, number) == len(before) + len(make_mark(number))
    assert find_position_after_mark(text, number + 1) is None


def test_shared_markers_end_outside_tokens() -> None:
    tokens = re.compile("<a>|<ab>|<end>")
    assert count_shared_prefix("<end>\n<a>", "<end>\n<ab>", tokens) == 6
    assert count_shared_prefix("<end>", "<end>x", tokens) == 5
    assert count_shared_prefix("", "<end>", tokens) == 0
