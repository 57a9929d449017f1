"""Records excluded from training: counted by reason, with the first place of each."""

from typing import Any

from dist_peft.core.errors import UserError
from dist_peft.data.files import RecordPlace
from dist_peft.data.tally import Tally

__all__ = ["BLANK", "WEIGHT_COLUMNS", "ExcludedRecords", "find_excluding_column", "is_zero_weight"]

BLANK = "have an empty text or completion"
"""Reason for a record with only white space to train on: only the end token would be a target."""

WEIGHT_COLUMNS = ("weight", "sample_weight", "loss_weight", "train", "trainable", "loss_mask")
"""Columns that data sets use to mark whether a record contributes to the loss."""

_WEIGHTS = frozenset(WEIGHT_COLUMNS)
_ZERO = ("0", "0.0", "false", "no")


def is_zero_weight(value: Any) -> bool:
    """Return whether a value of a column of ``WEIGHT_COLUMNS`` excludes the record."""
    if isinstance(value, str):
        return value.strip().lower() in _ZERO
    return isinstance(value, bool | int | float) and value == 0


def find_excluding_column(record: dict[str, Any], taken: set[str]) -> str | None:
    """Return the column that excludes ``record`` from the loss; None if there is none.

    Args:
        taken: columns with another meaning here: roles read them, or they are ignored.
    """
    for name in _WEIGHTS.intersection(record) and WEIGHT_COLUMNS:
        if name in record and name not in taken and is_zero_weight(record[name]):
            return name
    return None


class ExcludedRecords:
    """Count the records of a source, and the excluded ones by reason.

    Args:
        path: of the source.
        key: its configuration key, such as ``data.train[0]``.

    Attributes:
        all_records: number of all records. excluded: of the excluded ones, by reason.
    """

    def __init__(self, path: str, key: str) -> None:
        self._path, self._key = path, key
        self.all_records, self.excluded = Tally(), Tally()

    def count_record(self) -> None:
        """Count a record, excluded or not."""
        self.all_records.count("")

    def count_excluded(self, reason: str, place: RecordPlace) -> None:
        """Count an excluded record; ``reason`` completes "3 of 10 records ..."."""
        self.excluded.count(reason, place)

    @property
    def user_notes(self) -> list[str]:
        """One-time warnings for the user."""
        return [
            f"left out {count} of {self.all_records.total()} records, which {reason}; the first is "
            f"{first}"
            for reason, count, first in self.excluded.list_entries()
        ]

    def refuse_if_all(self) -> None:
        """Check that a record is left.

        Raises:
            UserError: no record is left, or there was none.
        """
        records, entries = self.all_records.total(), self.excluded.list_entries()
        if not records:
            raise UserError(f"{self._key}: {self._path} holds no records")
        if self.excluded.total() < records:
            return
        parts = [
            f"{count if len(entries) > 1 else f'all {count} records of {self._path}'} "
            f"{reason} (the first is {first})"
            for reason, count, first in entries
        ]
        what = "" if len(parts) == 1 else f"of the {records} records of {self._path} "
        raise UserError(
            f"{self._key}: {what}{', '.join(parts)}: nothing is left to train on; check "
            f"{self._key}.columns, or remove the source"
        )
