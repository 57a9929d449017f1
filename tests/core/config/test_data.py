"""What the ``data`` section refuses; the rest is tested with the whole tree in ``test_config``."""

import itertools
from typing import Any

import pytest

from dist_peft.core.config.io import parse_config
from dist_peft.core.errors import UserError

WRONG = [5, 2.5, True, [5], [[]], {"path": 5}]


@pytest.mark.parametrize(
    ("key", "value"), [("train", None), ("train", []), *itertools.product(("train", "eval"), WRONG)]
)
def test_sources_of_a_wrong_type_are_named(key: str, value: Any) -> None:
    tree = {"base": {"path": "m"}, "data": {"train": ["a"], key: value}}
    with pytest.raises(UserError, match=rf"data\.{key}"):
        parse_config(tree)


def test_text_stands_for_a_path() -> None:
    config = parse_config({"base": {"path": "m"}, "data": {"train": "a.jsonl", "eval": ["b"]}})
    assert [s.path for s in (*config.data.train, *config.data.eval)] == ["a.jsonl", "b"]
