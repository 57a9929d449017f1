"""Describe how a source is read: files, format, the columns of its roles, and those left."""

from dataclasses import dataclass

from dist_peft.core.config.run import DataSource
from dist_peft.core.errors import UserError
from dist_peft.data.files import open_source, read_records
from dist_peft.data.record_fields import MISSING, get_column_value, parse_template_fields
from dist_peft.data.record_formats import recognize_source

__all__ = ["SourceDescription", "describe_source"]


@dataclass(frozen=True)
class SourceDescription:
    """How the first record of a source is read.

    Attributes:
        file: of that record.
        columns: role -> column, of the roles that the record has.
        guessed: the columns follow from their names, without a setting.
        unused: its columns that no role, template or ``ignore`` names.
        ignored: its columns that ``ignore`` names.
    """

    file: str
    format: str
    columns: dict[str, str]
    guessed: bool
    unused: tuple[str, ...]
    ignored: tuple[str, ...]


def describe_source(source: DataSource, key: str) -> SourceDescription:
    """Return the description of ``source``; only its first record is read.

    Args:
        key: configuration key for messages, such as ``data.train[0]``.

    Raises:
        UserError: unreadable, without records, or of no known format.
    """
    first = next(read_records(open_source(source, key), 1), None)
    if first is None:
        raise UserError(f"{key}: {source.path} holds no records")
    place, record = first
    used, found, _ = recognize_source(source, record, place.file, key)
    columns = {}
    for role in (*found.required, *found.optional):
        column = used.columns.get(role, role)
        if role not in used.columns and column not in record:
            column = found.aliases.get(role, column)
        templated = source.template is not None and role == found.templated
        present = get_column_value(record, column) is not MISSING
        if present and column not in source.ignore and not templated:
            columns[role] = column
    named = {*columns.values(), *parse_template_fields(source.template)}
    taken = {name.partition(".")[0] for name in named} | named
    return SourceDescription(
        place.file,
        found.name,
        columns,
        used is not source,
        tuple(name for name in record if name not in taken and name not in source.ignore),
        tuple(name for name in record if name in source.ignore),
    )
