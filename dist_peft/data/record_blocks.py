"""Blocks of consecutive records of a file, as cheap as reading them can be.

A block is read from a file and not parsed yet: lines of JSON, or an Arrow batch. It can be
sent to another process, which parses it, so that the process that reads the file does little more
than that. A block has at most ``BLOCK_RECORDS`` records and, unless one record alone is larger,
``BLOCK_BYTES``: the blocks in flight bound the memory, whatever the size of a file or a record.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dist_peft.core.errors import UserError
from dist_peft.data.arrow_nulls import convert_record_batch

if TYPE_CHECKING:
    import pyarrow

__all__ = [
    "BLOCK_BYTES",
    "BLOCK_RECORDS",
    "NOT_JSON",
    "ArrowRecords",
    "JsonLines",
    "PlainRecords",
    "Record",
    "RecordBlock",
    "convert_to_record",
    "explain_arrow_errors",
    "group_lines",
    "group_records",
    "split_arrow_batch",
]

Record = dict[str, Any]

BLOCK_RECORDS = 512
BLOCK_BYTES = 2**20
"""Characters or bytes of a block, before they are parsed."""

NOT_JSON = (ValueError, RecursionError)
"""Exceptions of ``json``: invalid text, numbers of thousands of digits, too deep nesting."""


class RecordBlock(Protocol):
    """Consecutive records of a file."""

    def __len__(self) -> int: ...

    def parse_records(self) -> Iterator[Record]:
        """Yield the records.

        Raises:
            UserError: a record is not valid, naming file and line or record.
        """


@dataclass(frozen=True)
class PlainRecords:
    """Records that the reader of the file has parsed already."""

    records: list[Record]

    def __len__(self) -> int:
        return len(self.records)

    def parse_records(self) -> Iterator[Record]:
        return iter(self.records)


@dataclass(frozen=True)
class JsonLines:
    """Lines of JSON.

    Attributes:
        first: number of the first line in ``file``, from 1.
        lines: blank ones included, which hold no record. count: of the others.
    """

    file: Path
    first: int
    lines: list[str]
    count: int

    def __len__(self) -> int:
        return self.count

    def parse_records(self) -> Iterator[Record]:
        parse = json.JSONDecoder().decode
        for number, line in enumerate(self.lines, start=self.first):
            if line.isspace():
                continue
            try:
                item = parse(line)
            except NOT_JSON as error:
                raise UserError(
                    f"file {self.file}, line {number} is not valid JSON: {error}"
                ) from None
            yield (
                item
                if type(item) is dict
                else convert_to_record(item, f"{self.file}, line {number}")
            )


class ArrowRecords:
    """The rows of a validated Arrow batch.

    Args:
        file: names the file in messages; None: of a data set that ``datasets`` has read.
    """

    def __init__(self, file: Path | None, batch: "pyarrow.RecordBatch") -> None:
        self._file, self._batch = file, batch

    def __len__(self) -> int:
        return int(self._batch.num_rows)

    def parse_records(self) -> Iterator[Record]:
        with explain_arrow_errors(self._file):
            yield from convert_record_batch(self._batch)

    def __reduce__(self) -> tuple[Callable[..., "ArrowRecords"], tuple[Path | None, Any]]:
        # pickle would write the whole buffers of which a slice is a part
        import pyarrow

        sink = pyarrow.BufferOutputStream()
        with pyarrow.ipc.new_stream(sink, self._batch.schema) as stream:
            stream.write_batch(self._batch)
        return _unpickle_arrow_records, (self._file, sink.getvalue().to_pybytes())


def _unpickle_arrow_records(file: Path | None, data: bytes) -> ArrowRecords:
    import pyarrow

    # in a forked process the threads of pyarrow do not exist
    options = pyarrow.ipc.IpcReadOptions(use_threads=False)
    with pyarrow.ipc.open_stream(data, options=options) as stream:
        return ArrowRecords(file, stream.read_next_batch())


@contextmanager
def explain_arrow_errors(file: Path | None) -> Iterator[None]:
    """Turn errors of ``pyarrow`` about the contents of ``file`` into a ``UserError``."""
    from pyarrow import ArrowException

    try:
        yield
    # pyarrow raises either class for damaged files, and Python's own for impossible values
    except (ArrowException, OSError, ValueError, OverflowError) as error:
        if file is None or isinstance(error, UserError):
            raise
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError(
            f"file {file} is not valid {file.suffix[1:]}: {reason}; download or write it again"
        ) from None


def split_arrow_batch(batch: "pyarrow.RecordBatch") -> Iterator["pyarrow.RecordBatch"]:
    """Yield ``batch`` in slices that are no larger than a block."""
    rows = batch.num_rows
    parts = max(-(-rows // BLOCK_RECORDS), min(-(-int(batch.nbytes) // BLOCK_BYTES), rows))
    if parts == 1:
        yield batch
        return
    size = -(-rows // parts)
    for start in range(0, rows, size):
        part = batch.slice(start, size)
        if part.num_rows > 1 and part.nbytes > 2 * BLOCK_BYTES:  # rows of very different sizes
            yield from split_arrow_batch(part)
        else:
            yield part


def convert_to_record(item: Any, where: str) -> Record:
    """Return ``item`` as a record; a string becomes ``{"text": string}``.

    Raises:
        UserError: it is neither an object nor a string.
    """
    if isinstance(item, str):
        return {"text": item}
    if not isinstance(item, dict):
        raise UserError(f"{where} is {type(item).__name__}, not an object or a string")
    return item


def group_lines(file: Path, lines: Iterable[str]) -> Iterator[JsonLines]:
    """Yield ``lines`` of ``file`` in blocks.

    An error of reading is raised behind the lines before it.
    """
    number = 0

    def make_block() -> JsonLines:
        return JsonLines(file, number - len(block) + 1, block, count)

    block: list[str] = []
    count = size = 0
    try:
        for number, line in enumerate(lines, start=1):  # noqa: B007
            block.append(line)
            count += not line.isspace()
            size += len(line)
            if count == BLOCK_RECORDS or size >= BLOCK_BYTES:
                yield make_block()
                block, count, size = [], 0, 0
    except Exception:
        if block:
            yield make_block()
        raise
    if block:
        yield make_block()


def group_records(records: Iterable[tuple[Record, int]]) -> Iterator[PlainRecords]:
    """Yield records, each with its size in characters, in blocks.

    An error of reading is raised behind the records before it.
    """
    block: list[Record] = []
    total = 0
    try:
        for record, size in records:
            block.append(record)
            total += size
            if len(block) == BLOCK_RECORDS or total >= BLOCK_BYTES:
                yield PlainRecords(block)
                block, total = [], 0
    except Exception:
        if block:
            yield PlainRecords(block)
        raise
    if block:
        yield PlainRecords(block)
