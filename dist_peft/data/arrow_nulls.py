"""Removal of the null keys that Arrow adds to nested records.

A column of structs has the keys of all records: a tool that takes ``city`` and one that takes
``query`` come back with both, one of them null, and a chat template would write both. JSON text is
one value to Arrow and comes back as it was written.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow

__all__ = ["convert_record_batch"]

Record = dict[str, Any]


def convert_record_batch(batch: "pyarrow.RecordBatch | pyarrow.Table") -> Iterator[Record]:
    """Yield the rows of ``batch`` as plain values, without null keys in nested records.

    Top-level columns are kept, null or not. ``default: null`` of a JSON schema is kept where no
    record has another default: it was then in the data, since Arrow only adds keys that have a
    value in some record.
    """
    import pyarrow.types as kinds

    def strip_null_keys(value: Any, kind: Any) -> Any:
        if value is None:
            return None
        if kinds.is_struct(kind):
            fields = [kind.field(number) for number in range(kind.num_fields)]
            return {
                field.name: strip_null_keys(value[field.name], field.type)
                for field in fields
                if value[field.name] is not None
                or (field.name == "default" and kinds.is_null(field.type))
            }
        if kinds.is_list(kind) or kinds.is_large_list(kind) or kinds.is_fixed_size_list(kind):
            return [strip_null_keys(item, kind.value_type) for item in value]
        return value

    nested = {field.name: field.type for field in batch.schema if kinds.is_nested(field.type)}
    for record in batch.to_pylist():
        yield {
            name: strip_null_keys(value, nested[name]) if name in nested else value
            for name, value in record.items()
        }
