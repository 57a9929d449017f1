import io
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_peft.data.json_list import JsonListError, iterate_json_list

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)


def read_items(text: str, size: int) -> list[Any]:
    stream = io.StringIO(text, newline="")
    found = list(iterate_json_list(stream.read(size), lambda: stream.read(size)))
    assert all(chars > 0 for _, chars in found)
    return [item for item, _ in found]


@settings(max_examples=40, deadline=None)
@given(st.lists(VALUES, max_size=5), st.integers(1, 9), st.sampled_from([None, 0, 2]))
def test_as_json_reads_it(items: list[Any], size: int, indent: int | None) -> None:
    text = f" {json.dumps(items, ensure_ascii=size % 2 == 0, indent=indent)}\r\n "
    assert read_items(text, size) == items


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet='[]{},:"\\u1e-.n \n', max_size=14), st.integers(1, 5))
def test_refused_where_json_refuses(rest: str, size: int) -> None:
    text = "[" + rest
    try:
        expected = json.loads(text)
    except json.JSONDecodeError:
        with pytest.raises(JsonListError):
            read_items(text, size)
    else:
        assert read_items(text, size) == expected


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize(
    "text",
    ['[\n{"a": 1},\n{"b" 2}]', "[1\n, 2 3]", '["a",\n "b', "[[1]]\n\n x", '[{"a": "\n"}]', "[1, 2"],
)
def test_errors_name_the_place_as_json_does(text: str, size: int) -> None:
    with pytest.raises(json.JSONDecodeError) as expected:
        json.loads(text)
    with pytest.raises(JsonListError) as found:
        read_items(text, size)
    assert str(found.value) == str(expected.value)


def test_a_broken_item_is_not_read_to_the_end_of_the_file() -> None:
    asked = []

    def read() -> str:
        asked.append(1)
        return '{"a": 1},' * 100

    with pytest.raises(JsonListError, match=r"Expecting ':' delimiter: line 1 column 7 \(char 6\)"):
        list(iterate_json_list('[{"a" 1},' + "1," * 20, read))
    assert not asked
