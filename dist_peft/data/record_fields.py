"""Access to a record by the roles of its source: the column that a role reads, and its text."""

import string
from dataclasses import dataclass
from typing import Any

from dist_peft.core.config.run import DataSource
from dist_peft.core.errors import UserError
from dist_peft.data.files import Record, RecordPlace
from dist_peft.data.messages import check_unicode

__all__ = ["MISSING", "RecordFields", "get_column_value", "parse_template_fields"]

MISSING = object()
"""Value of a role whose column is missing in the record."""


@dataclass(frozen=True)
class RecordFields:
    """A record, accessed by the roles of its source.

    Attributes:
        place: names the record in messages.
    """

    source: DataSource
    record: Record
    place: RecordPlace

    def column_of_role(self, role: str) -> str:
        """Return the column that ``role`` reads."""
        return self.source.columns.get(role, role)

    def get_raw_value(self, role: str) -> Any:
        """Return the value of ``role``; ``MISSING`` also if ``source.ignore`` names its column."""
        column = self.column_of_role(role)
        if column in self.source.ignore:
            return MISSING
        return get_column_value(self.record, column)

    def get_text(self, role: str) -> str:
        return self.check_text_value(self.get_raw_value(role), self.column_of_role(role))

    def get_optional_text(self, role: str) -> str:
        """Like ``text``, but return the empty string for a missing or null value."""
        return "" if self.get_raw_value(role) in (None, MISSING) else self.get_text(role)

    def fill_template(self, template: str) -> str:
        """Return ``template`` with each ``{name}`` replaced by the column or role ``name``."""
        parts = []
        for literal, name, _, _ in string.Formatter().parse(template):
            parts.append(literal)
            if name is not None:
                column = get_column_value(self.record, name)
                is_role = column is MISSING and name in (*self.source.columns, "input")
                parts.append(
                    self.get_optional_text(name) if is_role else self.check_text_value(column, name)
                )
        return "".join(parts)

    def check_text_value(self, value: Any, column: str) -> str:
        """Return ``value`` of ``column``, if it is text.

        Raises:
            UserError: it is missing, not text, or not valid Unicode.
        """
        if value is MISSING:
            raise UserError(f"{self.place} has no column {column} (has {', '.join(self.record)})")
        if not isinstance(value, str):
            kind = "null" if value is None else f"{type(value).__name__} {value!r:.40}"
            raise UserError(f"{self.place}: column {column} must be text but is {kind}")
        # most texts are ASCII, and the name of the place is only needed for the others
        return value if value.isascii() else check_unicode(value, f"{self.place}: column {column}")


def get_column_value(record: Any, path: str) -> Any:
    """Return the value at column ``path``, else ``MISSING``; ``a.0.b`` indexes nested values."""
    if isinstance(record, dict) and path in record:
        return record[path]
    head, _, rest = path.partition(".")
    if isinstance(record, dict) and head in record:
        inner = record[head]
    elif isinstance(record, list) and head.isdecimal() and int(head) < len(record):
        inner = record[int(head)]
    else:
        return MISSING
    return get_column_value(inner, rest) if rest else inner


def parse_template_fields(template: str | None) -> set[str]:
    """Return the names of the columns and roles that ``template`` writes."""
    return {name for _, name, _, _ in string.Formatter().parse(template or "") if name}
