"""Read raw records from files: one reader for each file extension, compressed or not.

Text formats are read with the standard library rather than through Arrow, because type inference
changes data: the string ``"2020-01-01"`` becomes a timestamp, the CSV field ``002`` becomes 2,
``NA`` becomes null, and missing keys appear with null. Here every JSON value keeps its type, every
CSV field is text, and an error can name the record. Parquet and Arrow files, which have typed
columns, are read with ``pyarrow``, as plain values: images and audio are not decoded, and keys
missing in a nested record do not appear. Their batches are fully validated, so that altered bytes
cannot cause reads beyond an array.
"""

import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dist_peft.core.errors import UserError
from dist_peft.data.arrow_nulls import convert_record_batch

__all__ = ["COMPRESSIONS", "ENDINGS", "Record", "find_data_ending", "is_table", "read_record_file"]

Record = dict[str, Any]

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
"""Extension of a compressed text file -> name of the codec in ``pyarrow``."""

_NOT_JSON = (ValueError, RecursionError)
"""Exceptions of ``json``: invalid text, numbers of thousands of digits, too deep nesting."""

_BATCH = 1024  # records of an Arrow or Parquet file held in memory at a time


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


def read_record_file(file: Path, column_names: Sequence[str] = ()) -> Iterator[Record]:
    """Yield the records of a file that has a ``find_data_ending``.

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
            yield from _read_record_batches(file, binary) if binary else _TEXT_READERS[kind](file)
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


def _read_json(file: Path) -> Iterator[Record]:
    """Read a list of records or strings, one record, or (despite the extension) JSON lines."""
    with _open_text_file(file) as lines:
        text = lines.read()
    if not text.strip():
        return
    try:
        tree = json.loads(text)
    except _NOT_JSON as error:
        first, _, rest = text.lstrip().partition("\n")
        if rest.strip() and _is_json_text(first):
            yield from _read_jsonl(file)
            return
        raise UserError(f"file {file} is not valid JSON: {error}") from None
    for number, item in enumerate(tree if isinstance(tree, list) else [tree], start=1):
        yield _convert_to_record(item, f"{file}, record {number}")


def _is_json_text(text: str) -> bool:
    try:
        json.loads(text)
    except _NOT_JSON:
        return False
    return True


def _read_jsonl(file: Path) -> Iterator[Record]:
    with _open_text_file(file) as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                item = json.loads(line)
            except _NOT_JSON as error:
                raise UserError(f"file {file}, line {number} is not valid JSON: {error}") from None
            yield _convert_to_record(item, f"{file}, line {number}")


def _convert_to_record(item: Any, where: str) -> Record:
    """Return ``item`` as a record; a string becomes ``{"text": string}``."""
    if isinstance(item, str):
        return {"text": item}
    if not isinstance(item, dict):
        raise UserError(f"{where} is {type(item).__name__}, not an object or a string")
    return item


_TABLE_DIALECTS: dict[str, dict[str, Any]] = {
    # quotes as in RFC 4180
    ".csv": {"delimiter": ",", "strict": True},
    # quotes are plain characters (IANA)
    ".tsv": {"delimiter": "\t", "quoting": csv.QUOTE_NONE},
}


def _read_csv(file: Path) -> Iterator[Record]:
    yield from _read_table(file, _TABLE_DIALECTS[".csv"])


def _read_tsv(file: Path) -> Iterator[Record]:
    yield from _read_table(file, _TABLE_DIALECTS[".tsv"])


def _read_table(
    file: Path, dialect: dict[str, Any], column_names: Sequence[str] = ()
) -> Iterator[Record]:
    """Read a table whose first line names the columns, unless ``column_names`` does."""
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
            yield dict(zip(header, row, strict=True))


def _read_text_document(file: Path) -> Iterator[Record]:
    """Read the whole file as one document."""
    with _open_text_file(file) as lines:
        text = lines.read()
    if text:
        yield {"text": text}


# -- typed columns -------------------------------------------------------------------------------


def _read_record_batches(file: Path, batches: Callable[[Path], Iterator[Any]]) -> Iterator[Record]:
    """Yield the records of the Arrow record batches that ``batches`` yields for ``file``."""
    from pyarrow import ArrowException

    file.open("rb").close()  # so that a missing read permission is reported as such
    try:
        for batch in batches(file):
            batch.validate(full=True)
            yield from convert_record_batch(batch)
    # pyarrow raises either class for damaged files, and Python's own for impossible values
    except (ArrowException, OSError, ValueError, OverflowError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError(
            f"file {file} is not valid {file.suffix[1:]}: {reason}; download or write it again"
        ) from None


def _iterate_parquet_batches(file: Path) -> Iterator[Any]:
    from pyarrow import parquet

    with parquet.ParquetFile(file, page_checksum_verification=True) as table:
        yield from table.iter_batches(batch_size=_BATCH)


def _iterate_arrow_batches(file: Path) -> Iterator[Any]:
    """Yield the batches of an Arrow stream (written by ``datasets``) or of an Arrow file."""
    import pyarrow

    with pyarrow.memory_map(str(file)) as stored:
        if stored.read(6) == b"ARROW1":
            with pyarrow.ipc.open_file(stored) as table:
                for number in range(table.num_record_batches):
                    yield from _slice_batch(table.get_batch(number))
            return
        stored.seek(0)
        with pyarrow.ipc.open_stream(stored) as stream:
            for batch in stream:
                yield from _slice_batch(batch)


def _slice_batch(batch: Any) -> Iterator[Any]:
    for start in range(0, batch.num_rows, _BATCH):
        yield batch.slice(start, _BATCH)


_TEXT_READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
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
