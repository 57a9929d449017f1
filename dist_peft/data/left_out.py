"""Records excluded from training: counted by reason, with the first place of each."""

from typing import Any

from dist_peft.core.errors import UserError
from dist_peft.data.files import RecordPlace

__all__ = ["BLANK", "WEIGHT_COLUMNS", "ExcludedRecords", "find_excluding_column", "is_zero_weight"]

BLANK = "have an empty text or completion"
"""Reason for a record with only white space to train on: only the end token would be a target."""

WEIGHT_COLUMNS = ("weight", "sample_weight", "loss_weight", "train", "trainable", "loss_mask")
"""Columns that data sets use to mark whether a record contributes to the loss."""

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
    for name in WEIGHT_COLUMNS:
        if name in record and name not in taken and is_zero_weight(record[name]):
            return name
    return None


class ExcludedRecords:
    """Count the records of a source, and the excluded ones by reason.

    Args:
        path: of the source.
        key: its configuration key, such as ``data.train[0]``.

    Attributes:
        records: number of all records.
    """

    def __init__(self, path: str, key: str) -> None:
        self._path, self._key = path, key
        self.records = 0
        self._counts: dict[str, int] = {}
        self._first: dict[str, RecordPlace] = {}

    def count_excluded(self, reason: str, place: RecordPlace) -> None:
        """Count an excluded record; ``reason`` completes "3 of 10 records ..."."""
        self._counts[reason] = self._counts.get(reason, 0) + 1
        self._first.setdefault(reason, place)

    @property
    def user_notes(self) -> list[str]:
        """One-time warnings for the user."""
        return [
            f"left out {count} of {self.records} records, which {reason}; the first is "
            f"{self._first[reason]}"
            for reason, count in self._counts.items()
        ]

    def refuse_if_all(self) -> None:
        """Check that a record is left.

        Raises:
            UserError: no record is left, or there was none.
        """
        if not self.records:
            raise UserError(f"{self._key}: {self._path} holds no records")
        if sum(self._counts.values()) < self.records:
            return
        parts = [
            f"{count if len(self._counts) > 1 else f'all {count} records of {self._path}'} "
            f"{reason} (the first is {self._first[reason]})"
            for reason, count in self._counts.items()
        ]
        what = "" if len(parts) == 1 else f"of the {self.records} records of {self._path} "
        raise UserError(
            f"{self._key}: {what}{', '.join(parts)}: nothing is left to train on; check "
            f"{self._key}.columns, or remove the source"
        )
