import pytest

from dist_peft.core.config.run import DataSource
from dist_peft.core.errors import UserError
from dist_peft.data.files import RecordPlace
from dist_peft.data.record_fields import (
    MISSING,
    RecordFields,
    get_column_value,
    parse_template_fields,
)


def test_column_values() -> None:
    record = {"a": {"b": [{"c": 1}]}, "a.x": 2}
    assert get_column_value(record, "a.b.0.c") == 1
    assert get_column_value(record, "a.x") == 2
    for path in ("b", "a.c", "a.b.1", "a.b.c", "a.b.0.c.d"):
        assert get_column_value(record, path) is MISSING


def test_roles_read_columns_unless_ignored() -> None:
    source = DataSource(path="a", columns={"text": "t"}, ignore=["tools"])
    fields = RecordFields(source, {"t": "x", "tools": "[]", "n": None}, RecordPlace("a", 1))
    assert fields.get_text("text") == "x" and fields.fill_template("{text}{t}") == "xx"
    assert fields.get_raw_value("tools") is MISSING
    assert fields.get_optional_text("n") == fields.get_optional_text("nothing") == ""
    with pytest.raises(UserError, match="a, record 1: column n must be text but is null"):
        fields.get_text("n")


def test_template_fields() -> None:
    assert parse_template_fields("{a} {{b}} {c d}") == {"a", "c d"}
    assert parse_template_fields(None) == set()
