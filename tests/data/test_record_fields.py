import pytest

from dist_peft.core.config.run import DataSource
from dist_peft.core.errors import UserError
from dist_peft.data.files import Place
from dist_peft.data.record_fields import MISSING, RecordFields, column_value, template_fields


def test_column_values() -> None:
    record = {"a": {"b": [{"c": 1}]}, "a.x": 2}
    assert column_value(record, "a.b.0.c") == 1
    assert column_value(record, "a.x") == 2
    for path in ("b", "a.c", "a.b.1", "a.b.c", "a.b.0.c.d"):
        assert column_value(record, path) is MISSING


def test_roles_read_columns_unless_ignored() -> None:
    source = DataSource(path="a", columns={"text": "t"}, ignore=["tools"])
    fields = RecordFields(source, {"t": "x", "tools": "[]", "n": None}, Place("a", 1))
    assert fields.text("text") == "x" and fields.filled("{text}{t}") == "xx"
    assert fields.raw("tools") is MISSING
    assert fields.optional("n") == fields.optional("nothing") == ""
    with pytest.raises(UserError, match="a, record 1: column n must be text but is null"):
        fields.text("n")


def test_template_fields() -> None:
    assert template_fields("{a} {{b}} {c d}") == {"a", "c d"}
    assert template_fields(None) == set()
