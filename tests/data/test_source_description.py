"""How a source's first record is read: format, columns of roles, leftovers."""

from pathlib import Path
from typing import Any

import pytest

from dist_peft.core.config.run import DataSource
from dist_peft.core.errors import UserError
from dist_peft.data.source_description import describe_source
from tests.support.data_files import write_jsonl

PAIR = {"prompt": "p", "completion": "c"}


@pytest.mark.parametrize(
    ("record", "settings", "expected"),
    [
        ({**PAIR, "id": 1}, {}, ("completion", {"prompt": "prompt", "completion": "completion"})),
        (
            {"conversations": [], "x": 1},
            {"ignore": ["x"]},
            ("chat", {"messages": "conversations"}),
        ),
        (
            {"n": [{"in": "a", "out": "b"}]},
            {"columns": {"prompt": "n.0.in", "completion": "n.0.out"}},
            ("completion", {"prompt": "n.0.in", "completion": "n.0.out"}),
        ),
        (
            {"a": "x", "b": "y", "completion": "c"},
            {"template": "{a} {b}"},
            ("completion", {"completion": "completion"}),
        ),
        (
            {"instruction": "i", "input": "x", "output": "o"},
            {},
            ("alpaca", {"instruction": "instruction", "input": "input", "output": "output"}),
        ),
    ],
)
def test_format_and_columns(
    tmp_path: Path, record: dict[str, Any], settings: dict[str, Any], expected: tuple[str, Any]
) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [record])
    found = describe_source(DataSource.model_validate({"path": str(file), **settings}), "k")
    assert (found.format, found.columns) == expected and not found.guessed
    assert found.unused == (("id",) if "id" in record else ())
    assert found.ignored == (("x",) if "ignore" in settings else ())


def test_guess_and_errors(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"question": "q", "answer": "a", "id": 1}])
    found = describe_source(DataSource(path=str(file)), "k")
    assert found.guessed and found.columns == {"prompt": "question", "completion": "answer"}
    assert found.unused == ("id",)
    for records, words in (([], "holds no records"), ([{"a": 1}], "cannot tell the format")):
        write_jsonl(file, records)
        with pytest.raises(UserError, match=words):
            describe_source(DataSource(path=str(file)), "k")
