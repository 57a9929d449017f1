"""Counts of notes about the records of a source, each with the place of the first.

Records may be counted in several processes: each counts for a chunk of records, and the counts are
added in the order of the chunks, which gives the same as one process that counts all.
"""

__all__ = ["Tally"]


class Tally:
    """Counts by name, in the order in which the names first occurred."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._first: dict[str, str] = {}

    def count(self, name: str, place: object = "", number: int = 1) -> None:
        """Add ``number`` to ``name``; ``place`` is kept as text if it is the first."""
        if name not in self._counts:
            self._counts[name], self._first[name] = 0, str(place)
        self._counts[name] += number

    def add(self, other: "Tally") -> None:
        """Add the counts of later records."""
        for name, number in other._counts.items():
            self.count(name, other._first[name], number)

    def clear(self) -> None:
        """Begin again from zero."""
        self._counts, self._first = {}, {}

    def total(self) -> int:
        """Return the sum of all counts."""
        return sum(self._counts.values())

    def get_count(self, name: str) -> int:
        return self._counts.get(name, 0)

    def list_entries(self) -> list[tuple[str, int, str]]:
        """Return (name, count, first place) of each name."""
        return [(name, number, self._first[name]) for name, number in self._counts.items()]
