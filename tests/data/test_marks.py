import re

from hypothesis import given, settings
from hypothesis import strategies as st

from dist_peft.data.marks import MARK, mark, mark_number, position_after, shared_markers


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.text("ab\n"), st.text("ab\n"))
def test_marks_are_found_and_removed(number: int, before: str, after: str) -> None:
    text = before + mark(number) + after
    (found,) = MARK.finditer(text)
    assert mark_number(found) == number
    assert MARK.sub("", text) == before + after
    assert position_after(text, number) == len(before) + len(mark(number))
    assert position_after(text, number + 1) is None


def test_shared_markers_end_outside_tokens() -> None:
    tokens = re.compile("<a>|<ab>|<end>")
    assert shared_markers("<end>\n<a>", "<end>\n<ab>", tokens) == 6
    assert shared_markers("<end>", "<end>x", tokens) == 5
    assert shared_markers("", "<end>", tokens) == 0
