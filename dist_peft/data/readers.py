"""Read raw records from files: one reader for each file extension, compressed or not.

Text formats are read with the standard library rather than through Arrow, because type inference
changes data: the string ``"2020-01-01"`` becomes a timestamp, the CSV field ``002`` becomes 2,
``NA`` becomes null, and missing keys appear with null. Here every JSON value keeps its type, every
CSV field is text, and an error can name the record. Parquet and Arrow files, which have typed
columns, are read with ``pyarrow``, as plain values: images and audio are not decoded, and keys
missing in a nested record do not appear. Their batches are fully validated, so that altered bytes
cannot cause reads beyond an array.

A ``.json`` list and a Parquet row group are read piece by piece, too: no file needs the memory that
it takes on disk, except ``.txt``, which is one document.
"""

import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from dist_peft.core.errors import UserError
from dist_peft.data.json_list import iterate_json_list
from dist_peft.data.record_blocks import (
    NOT_JSON,
    ArrowRecords,
    Record,
    RecordBlock,
    convert_to_record,
    explain_arrow_errors,
    group_lines,
    group_records,
    split_arrow_batch,
)

__all__ = [
    "COMPRESSIONS",
    "ENDINGS",
    "Record",
    "find_data_ending",
    "is_table",
    "read_file_blocks",
    "read_record_file",
]

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
"""Extension of a compressed text file -> name of the codec in ``pyarrow``."""

_BATCH = 1024  # rows of a Parquet file decoded at a time

_PEEKED = 2**20
"""Characters of a JSON file read at a time."""

SizedRecord = tuple[Record, int]
"""A record, and its size in characters."""


def find_data_ending(file: Path) -> str | None:
    """Return the extension that selects a reader, such as ``.jsonl`` or ``.jsonl.gz``; else None.

    Parquet and Arrow files compress their own columns, so ``.parquet.gz`` has no reader.
    """
    endings = [ending.lower() for ending in file.suffixes[-2:]]
    if endings and endings[-1] in COMPRESSIONS:
        known = len(endings) == 2 and endings[0] in _TEXT_READERS
        return "".join(endings) if known else None
    return endings[-1] if endings and endings[-1] in ENDINGS else None


def is_table(file: Path) -> bool:
    """Return whether ``file`` is a text table, which may lack a header line."""
    return _split_ending(file)[0] in _TABLE_DIALECTS


def read_record_file(file: Path) -> Iterator[Record]:
    """Yield the records of a file; see ``read_file_blocks``."""
    return (record for block in read_file_blocks(file) for record in block.parse_records())


def read_file_blocks(file: Path, column_names: Sequence[str] = ()) -> Iterator[RecordBlock]:
    """Yield the records of a file that has a ``find_data_ending``, in blocks not parsed yet.

    Args:
        column_names: of a table without a header line; empty: the first line names them.

    Raises:
        UserError: the file cannot be read, naming it and the line or record.
    """
    kind, compression = _split_ending(file)
    binary = _BINARY_READERS.get(kind)
    try:
        if column_names:
            yield from _read_table(file, _TABLE_DIALECTS[kind], column_names)
        else:
            yield from _read_arrow_blocks(file, binary) if binary else _TEXT_READERS[kind](file)
    except UnicodeDecodeError as error:
        raise UserError(f"file {file} is not UTF-8 text: {error}; convert it to UTF-8") from None
    except csv.Error as error:
        raise UserError(f"file {file} is not a valid {kind[1:]} table: {error}") from None
    except OSError as error:
        if error.strerror is None and compression:
            # an error of the decompressor has no errno
            raise UserError(
                f"file {file} is not a complete {compression} file: {error}; download or write it "
                "again"
            ) from None
        reason = (error.strerror or str(error)).lower()
        raise UserError(f"file {file} cannot be read: {reason}") from None


def _split_ending(file: Path) -> tuple[str, str]:
    """Return the extension that selects a reader, and that of the compression or ``""``."""
    ending = find_data_ending(file) or ""
    for suffix in COMPRESSIONS:
        if ending.endswith(suffix):
            return ending.removesuffix(suffix), suffix
    return ending, ""


@contextmanager
def _open_text_file(file: Path, newline: str | None = None) -> Iterator[io.TextIOBase]:
    """Open ``file`` as UTF-8 text without a byte-order mark, decompressed by its extension."""
    compression = COMPRESSIONS.get(file.suffix.lower())
    if compression is None:
        with file.open(encoding="utf-8-sig", newline=newline) as lines:
            yield lines
        return
    import pyarrow

    with (
        pyarrow.OSFile(str(file)) as stored,
        pyarrow.CompressedInputStream(stored, compression) as stream,
        io.TextIOWrapper(stream, encoding="utf-8-sig", newline=newline) as lines,
    ):
        yield lines


# -- text ----------------------------------------------------------------------------------------


def _read_json(file: Path) -> Iterator[RecordBlock]:
    """Read a list of records or strings, one record, or (despite the extension) JSON lines."""
    with _open_text_file(file) as lines:
        text = lines.read(_PEEKED)
        if text.lstrip().startswith("["):
            items = iterate_json_list(text, partial(lines.read, _PEEKED))
            yield from group_records(_number_items(items, file))
            return
        first, _, rest = text.lstrip().partition("\n")
        if not (rest.strip() and _is_json_text(first)):
            text += lines.read()
            if text.strip():
                yield from group_records(_number_items(_parse_whole(text), file))
            return
    yield from _read_jsonl(file)


def _parse_whole(text: str) -> Iterator[tuple[Any, int]]:
    yield json.loads(text), len(text)


def _number_items(items: Iterator[tuple[Any, int]], file: Path) -> Iterator[SizedRecord]:
    try:
        for number, (item, size) in enumerate(items, start=1):
            yield convert_to_record(item, f"{file}, record {number}"), size
    except UserError:
        raise
    except NOT_JSON as error:
        raise UserError(f"file {file} is not valid JSON: {error}") from None


def _is_json_text(text: str) -> bool:
    try:
        json.loads(text)
    except NOT_JSON:
        return False
    return True


def _read_jsonl(file: Path) -> Iterator[RecordBlock]:
    with _open_text_file(file) as lines:
        yield from group_lines(file, lines)


_TABLE_DIALECTS: dict[str, dict[str, Any]] = {
    # quotes as in RFC 4180
    ".csv": {"delimiter": ",", "strict": True},
    # quotes are plain characters (IANA)
    ".tsv": {"delimiter": "\t", "quoting": csv.QUOTE_NONE},
}


def _read_csv(file: Path) -> Iterator[RecordBlock]:
    return _read_table(file, _TABLE_DIALECTS[".csv"])


def _read_tsv(file: Path) -> Iterator[RecordBlock]:
    return _read_table(file, _TABLE_DIALECTS[".tsv"])


def _read_table(
    file: Path, dialect: dict[str, Any], column_names: Sequence[str] = ()
) -> Iterator[RecordBlock]:
    """Read a table whose first line names the columns, unless ``column_names`` does."""
    return group_records(_read_table_rows(file, dialect, column_names))


def _read_table_rows(
    file: Path, dialect: dict[str, Any], column_names: Sequence[str]
) -> Iterator[SizedRecord]:
    csv.field_size_limit(2**31 - 1)  # documents may exceed the default of 128 KiB
    with _open_text_file(file, newline="") as lines:
        rows = csv.reader(lines, **dialect)
        header = list(column_names) or next(rows, [])
        if twice := sorted(name for name, count in Counter(header).items() if count > 1):
            raise UserError(f"file {file} has more than one column {twice[0]}; rename one")
        for number, row in enumerate((row for row in rows if row), start=1):
            if len(row) != len(header):
                raise UserError(
                    f"{file}, record {number} (line {rows.line_num}) has {len(row)} fields, "
                    f"{'column_names' if column_names else 'the header'} {len(header)}: "
                    f"{', '.join(header)}"
                )
            yield dict(zip(header, row, strict=True)), sum(map(len, row))


def _read_text_document(file: Path) -> Iterator[RecordBlock]:
    """Read the whole file as one document."""
    with _open_text_file(file) as lines:
        text = lines.read()
    if text:
        yield from group_records([({"text": text}, len(text))])


# -- typed columns -------------------------------------------------------------------------------


def _read_arrow_blocks(
    file: Path, read_batches: Callable[[Path], Iterator[Any]]
) -> Iterator[RecordBlock]:
    """Yield the record batches that ``read_batches`` yields for ``file``, in blocks."""
    file.open("rb").close()  # so that a missing read permission is reported as such
    with explain_arrow_errors(file):
        for batch in read_batches(file):
            for part in split_arrow_batch(batch):
                part.validate(full=True)
                yield ArrowRecords(file, part)


def _iterate_parquet_batches(file: Path) -> Iterator[Any]:
    from pyarrow import parquet

    # mapped: else a whole column of a row group, which may be the whole file, is read into memory
    with parquet.ParquetFile(file, page_checksum_verification=True, memory_map=True) as table:
        yield from table.iter_batches(batch_size=_BATCH)


def _iterate_arrow_batches(file: Path) -> Iterator[Any]:
    """Yield the batches of an Arrow stream (written by ``datasets``) or of an Arrow file."""
    import pyarrow

    with pyarrow.memory_map(str(file)) as stored:
        if stored.read(6) == b"ARROW1":
            with pyarrow.ipc.open_file(stored) as table:
                for number in range(table.num_record_batches):
                    yield table.get_batch(number)
            return
        stored.seek(0)
        with pyarrow.ipc.open_stream(stored) as stream:
            yield from stream


_TEXT_READERS: dict[str, Callable[[Path], Iterator[RecordBlock]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".txt": _read_text_document,
}
_BINARY_READERS: dict[str, Callable[[Path], Iterator[Any]]] = {
    ".parquet": _iterate_parquet_batches,
    ".arrow": _iterate_arrow_batches,
}
ENDINGS = (".jsonl", ".json", *_BINARY_READERS, ".csv", ".tsv", ".txt")
