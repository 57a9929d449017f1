import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from dist_peft.data.arrow_nulls import convert_record_batch
from dist_peft.data.files import HubSource
from dist_peft.data.readers import read_record_file


def tool(**properties: Any) -> dict[str, Any]:
    return {"name": "f", "parameters": {"type": "object", "properties": properties}}


RECORDS: list[dict[str, Any]] = [
    {
        "tools": [tool(city={"type": "string", "enum": ["a"], "default": None})],
        "messages": [{"role": "assistant", "tool_calls": [{"arguments": {"city": "a"}}]}],
        "text": json.dumps({"default": None}),
    },
    {
        "tools": [tool(query={"type": "integer", "minimum": 1})],
        "messages": [{"role": "assistant", "tool_calls": [{"arguments": {"query": 1}}]}],
        "text": None,
    },
]


def test_keys_of_other_records_do_not_appear() -> None:
    table = pyarrow.Table.from_pylist(RECORDS)
    assert table.to_pylist() != RECORDS
    assert list(convert_record_batch(table)) == RECORDS


@pytest.mark.parametrize("ending", ["parquet", "arrow"])
def test_files(tmp_path: Path, ending: str) -> None:
    file = tmp_path / f"a.{ending}"
    table = pyarrow.Table.from_pylist(RECORDS)
    if ending == "parquet":
        # Parquet keeps the null type, too
        parquet.write_table(table, file)
    else:
        with pyarrow.ipc.new_stream(str(file), table.schema) as stream:
            stream.write_table(table)
    assert list(read_record_file(file)) == RECORDS


def test_hub_data() -> None:
    import datasets

    data = HubSource("a/b", datasets.Dataset.from_list(RECORDS))
    ((_, blocks),) = data.iterate_files()
    assert [record for block in blocks for record in block.parse_records()] == RECORDS


def test_lists_of_lists_and_nulls_in_lists_stay() -> None:
    records = [{"a": [[{"x": 1}, None], []]}, {"a": [[{"y": 2}]]}, {"a": None}]
    assert list(convert_record_batch(pyarrow.Table.from_pylist(records))) == records
