"""Build examples from the records of a source; ``record_formats`` builds each."""

from collections.abc import Iterable, Iterator

from dist_peft.core.config.run import DataSource
from dist_peft.core.errors import UserError
from dist_peft.data.augmenting import RecordAugmenter
from dist_peft.data.blank_turns import BlankTurnFilter, is_blank_turn
from dist_peft.data.examples import ChatExample, CompletionExample, Example, TextExample
from dist_peft.data.files import RecordPlace, RecordSource, read_records
from dist_peft.data.left_out import BLANK, ExcludedRecords, find_excluding_column
from dist_peft.data.meanings import UnusedColumnCheck
from dist_peft.data.record_blocks import Record
from dist_peft.data.record_fields import RecordFields
from dist_peft.data.record_formats import RecordFormat, recognize_source
from dist_peft.data.tally import Tally

__all__ = ["Example", "ExampleReader", "read_examples"]


class ExampleReader:
    """Build the examples of one source, and count records that are left out, by reason.

    The first record determines the format of the source, and the first one that is not left out
    the class of its examples. From then on a record does not depend on earlier ones, so that a copy
    in another process may build later examples; the counts of its ``tallies`` are added here.

    Args:
        key: configuration key of the source for messages, such as ``data.train[0]``.
        augmenter: makes the variants of each record.
    """

    def __init__(
        self, source: DataSource, key: str, augmenter: RecordAugmenter | None = None
    ) -> None:
        self._source, self._key, self._augmenter = source, key, augmenter
        self._format: RecordFormat | None = None
        self._guess: str | None = None
        self._required: list[str] = []
        self._unused: UnusedColumnCheck | None = None
        self._kind: type[Example] | None = None
        self._left_out = ExcludedRecords(source.path, key)
        self._blank_turns = BlankTurnFilter()

    @property
    def is_text(self) -> bool:
        """Whether the examples are plain text."""
        return self._kind is TextExample

    @property
    def has_conversations(self) -> bool:
        """Whether the examples are conversations."""
        return self._kind is ChatExample

    @property
    def tallies(self) -> tuple[Tally, ...]:
        left_out = self._left_out
        unused = () if self._unused is None else (self._unused.seen,)
        changed = () if self._augmenter is None else (self._augmenter.counts,)
        return (left_out.all_records, left_out.excluded, self._blank_turns.turns, *unused, *changed)

    def build_examples(
        self, records: Iterable[tuple[RecordPlace, Record]]
    ) -> Iterator[tuple[RecordPlace, Example]]:
        """Yield the example of each record that is not left out, then its variants.

        Raises:
            UserError: unknown format; a record that does not fit, named by file and number.
        """
        for place, record in records:
            if self._format is None or self._unused is None:
                self._choose_format(record, place)
                assert self._format is not None
                assert self._unused is not None
            self._left_out.count_record()
            if column := find_excluding_column(record, self._unused.taken):
                self._left_out.count_excluded(
                    f"say not to train on them ({column}: {record[column]})", place
                )
                continue
            self._unused.check_record(record, place)
            if lacking := self._format.list_missing_columns(self._required, record):
                raise UserError(
                    f"{place} has no column {lacking[0]} (has {', '.join(record)}), but the first "
                    f"record of the source is of format {self._format.name}; fix the record, or "
                    "give records of another form a source of their own"
                )
            fields = RecordFields(self._source, record, place)
            example = self._format.build(fields)
            self._kind = self._kind or type(example)
            if not isinstance(example, self._kind):
                raise UserError(
                    f"{place} holds {'messages' if isinstance(example, ChatExample) else 'text'} "
                    "where earlier records do not; give each kind a file of its own"
                )
            if isinstance(example, ChatExample):
                example = ChatExample(
                    self._blank_turns.exclude_blank_turns(example.messages, place), example.tools
                )
            if _is_blank_example(example):
                self._left_out.count_excluded(BLANK, place)
                continue
            yield place, example
            if self._augmenter is not None:
                for variant in self._augmenter.list_variants(fields, self._format, example):
                    yield place, variant

    def _choose_format(self, record: Record, place: RecordPlace) -> None:
        source, self._format, self._guess = recognize_source(
            self._source, record, place.file, self._key
        )
        self._source = source
        if self._augmenter is not None:
            self._augmenter.check_fields(self._format)
        self._required = self._format.list_required_columns(source)
        reads = {r for r in self._format.list_roles() if r not in source.columns} | {
            *self._format.aliases.values()
        }
        self._unused = UnusedColumnCheck(source, reads, self._format.name, self._key)

    def finish_source(self) -> list[str]:
        """Return one-time warnings for the user, after all records.

        Raises:
            UserError: no record was left.
        """
        self._left_out.refuse_if_all()
        unused = [] if self._unused is None else self._unused.user_notes
        changed = [] if self._augmenter is None else self._augmenter.user_notes
        guess = [] if self._guess is None else [self._guess]
        return [
            *guess,
            *self._left_out.user_notes,
            *self._blank_turns.user_notes,
            *unused,
            *changed,
        ]


def read_examples(
    source: DataSource, opened: RecordSource, key: str, notes: list[str] | None = None
) -> Iterator[tuple[RecordPlace, Example]]:
    """Yield every example of the source, with its place.

    Args:
        opened: from ``files.open_source``.
        key: configuration key for messages, such as ``data.train[0]``.
        notes: one-time warnings for the user are appended at the end.

    Raises:
        UserError: no records; unknown format; a record that does not fit, named by file and number.
    """
    reader = ExampleReader(source, key)
    yield from reader.build_examples(read_records(opened, source.limit))
    found = reader.finish_source()
    if notes is not None:
        notes += found


def _is_blank_example(example: Example) -> bool:
    """Return whether the target text of ``example`` is empty or white space."""
    if isinstance(example, TextExample):
        return not example.text.strip()
    if isinstance(example, CompletionExample):
        return not example.completion.strip()
    if isinstance(example, ChatExample):
        turns = [m for m in example.messages if m["role"] == "assistant"]
        remaining = [m for m in turns if m.get("train") is not False]
        return not remaining and any(is_blank_turn(m) for m in turns)
    return False
