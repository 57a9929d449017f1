"""From a path to raw records: which files a source means, and their records one by one.

Text formats are read with the standard library rather than through Arrow, because type inference
changes data: the string ``"2020-01-01"`` becomes a timestamp, the CSV field ``002`` becomes 2,
``NA`` becomes null, and keys that a record lacks appear with null. Here every JSON value keeps its
type, every CSV field is text, and an error can name the record. Parquet and hub data sets, which
carry their types, are read with ``datasets``.
"""

import csv
import glob
import itertools
import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dist_peft.core.config import DataSource
from dist_peft.core.errors import UserError
from dist_peft.core.log import ONCE

if TYPE_CHECKING:
    import datasets

__all__ = ["ENDINGS", "Opened", "Place", "Record", "open_source", "read_records"]

Record = dict[str, Any]
_LOG = logging.getLogger("dist_peft")

_NOT_JSON = (ValueError, RecursionError)
"""What ``json`` raises: for bad text, for numbers of thousands of digits, for too deep nesting."""

_HUB_ID = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+))?")


@dataclass(frozen=True)
class Place:
    """Where a record is: ``file`` as the user wrote it, ``number`` counted from 1."""

    file: str
    number: int

    def __str__(self) -> str:
        return f"{self.file}, record {self.number}"


class Opened(Protocol):
    """Where the records of a source come from, found but not read."""

    def fingerprint(self) -> list[list[str | int]]:
        """Absolute path, size and time of change of each file; what a token cache goes by.

        A file replaced by another of the same size and the same time is not noticed.
        """

    def parts(self) -> Iterator[tuple[str, Iterator[Record]]]:
        """Each file: its name for messages, and its records."""


@dataclass(frozen=True)
class LocalFiles:
    """Files of known endings, sorted."""

    files: tuple[Path, ...]

    def fingerprint(self) -> list[list[str | int]]:
        return _fingerprint(self.files)

    def parts(self) -> Iterator[tuple[str, Iterator[Record]]]:
        for file in self.files:
            yield str(file), _guarded(file, _READERS[file.suffix.lower()])


@dataclass(frozen=True)
class HubData:
    """A split of a hub data set, in the cache of ``datasets``."""

    name: str
    data: "datasets.Dataset"

    def fingerprint(self) -> list[list[str | int]]:
        return _fingerprint(tuple(Path(file["filename"]) for file in self.data.cache_files))

    def parts(self) -> Iterator[tuple[str, Iterator[Record]]]:
        yield self.name, iter(self.data)


def open_source(source: DataSource, key: str) -> Opened:
    """Find what ``source.path`` means: a file, a directory, a glob pattern or a hub data set.

    Args:
        source: of its ``path`` the first that fits: a file; a directory (its own files, not those
            of subdirectories); a pattern (``**`` crosses directories); ``org/name`` or
            ``org/name:config`` of the hub, unless ``org`` is a directory here.
        key: configuration key for messages, such as ``data.train[0]``.

    Raises:
        UserError: nothing there (told without asking the network, unless it can be a hub id),
            nothing of a known ending, or the hub data set cannot be loaded.
    """
    path = source.path
    hub = None if Path(path).exists() else _HUB_ID.fullmatch(path)
    if hub and Path(path).suffix.lower() not in ENDINGS and not Path(path).parent.is_dir():
        return _open_hub(source, hub["name"], hub["config"], key)
    if source.split != "train":
        _LOG.warning(
            "%s.split has no effect: %s is local, not a hub data set", key, path, extra=ONCE
        )
    return LocalFiles(_locate(path, key))


def _locate(path: str, key: str) -> tuple[Path, ...]:
    place = Path(path).expanduser()
    if place.is_file():
        if place.suffix.lower() not in ENDINGS:
            raise UserError(
                f"{key}: file {path} has the ending {place.suffix or '(none)'}; "
                f"readable are {', '.join(ENDINGS)}"
            )
        return (place,)
    if place.is_dir():
        found = [entry for entry in place.iterdir() if entry.is_file()]
        return _readable(found, f"{key}: directory {path}")
    if glob.has_magic(path):
        found = [Path(name) for name in glob.glob(str(place), recursive=True)]
        return _readable([f for f in found if f.is_file()], f"{key}: pattern {path}")
    raise UserError(
        f"{key}: file {path} does not exist (looked in {Path.cwd()}); "
        "give a file, a directory, a glob pattern, or a hub data set as org/name"
    )


def _readable(files: list[Path], what: str) -> tuple[Path, ...]:
    known = sorted(f for f in files if f.suffix.lower() in ENDINGS)
    if not known:
        others = sorted({f.suffix or f.name for f in files})[:5]
        raise UserError(
            f"{what} has no file with a readable ending ({', '.join(ENDINGS)})"
            + (f"; it has {', '.join(others)}" if others else "")
        )
    return tuple(known)


def _open_hub(source: DataSource, name: str, config: str | None, key: str) -> HubData:
    import datasets  # here: its import takes a second, and most runs need none of it

    try:
        data = datasets.load_dataset(name, config, split=source.split)
    # the library has no common class; these are: no network, not found, unknown split or config
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError(
            f"{key}: {source.path} is no local file, and as a hub data set (split "
            f"{source.split}) it could not be loaded: {reason}. Check the path, the name or the "
            "network; a configuration of a data set is written org/name:config"
        ) from None
    return HubData(source.path, data)


def _fingerprint(files: tuple[Path, ...]) -> list[list[str | int]]:
    stats = [(file.resolve(), file.stat()) for file in files]
    return [[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in stats]


def read_records(opened: Opened, limit: int | None) -> Iterator[tuple[Place, Record]]:
    """Every record in file order, at most ``limit`` of them.

    Raises:
        UserError: unreadable file, naming it and the line or record.
    """
    return itertools.islice(
        (
            (Place(label, number), record)
            for label, records in opened.parts()
            for number, record in enumerate(records, start=1)
        ),
        limit,
    )


def _guarded(file: Path, reader: Callable[[Path], Iterator[Record]]) -> Iterator[Record]:
    """Turn what a broken file raises into a ``UserError`` that names it."""
    try:
        yield from reader(file)
    except UnicodeDecodeError as error:
        raise UserError(f"file {file} is not UTF-8 text: {error}; convert it to UTF-8") from None
    except csv.Error as error:
        raise UserError(f"file {file} is not a valid {file.suffix[1:]} table: {error}") from None
    except PermissionError:
        raise UserError(f"file {file} cannot be read: permission denied") from None


def _read_json(file: Path) -> Iterator[Record]:
    """A list of records or strings, one record, or (whatever the ending says) JSON lines."""
    text = file.read_text(encoding="utf-8-sig")
    if not text.strip():
        return
    try:
        tree = json.loads(text)
    except _NOT_JSON as error:
        first, _, rest = text.lstrip().partition("\n")
        if rest.strip() and _is_json(first):
            yield from _read_jsonl(file)
            return
        raise UserError(f"file {file} is not valid JSON: {error}") from None
    for number, item in enumerate(tree if isinstance(tree, list) else [tree], start=1):
        yield _as_record(item, f"{file}, record {number}")


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except _NOT_JSON:
        return False
    return True


def _read_jsonl(file: Path) -> Iterator[Record]:
    with file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                item = json.loads(line)
            except _NOT_JSON as error:
                raise UserError(f"file {file}, line {number} is not valid JSON: {error}") from None
            yield _as_record(item, f"{file}, line {number}")


def _as_record(item: Any, where: str) -> Record:
    """A plain string stands for ``{"text": string}``."""
    if isinstance(item, str):
        return {"text": item}
    if not isinstance(item, dict):
        raise UserError(f"{where} is {type(item).__name__}, not an object or a string")
    return item


def _read_csv(file: Path) -> Iterator[Record]:
    """Comma-separated, header line first, quotes as in RFC 4180."""
    yield from _read_table(file, delimiter=",", strict=True)


def _read_tsv(file: Path) -> Iterator[Record]:
    """Tab-separated, header line first; quotes are ordinary characters (IANA's definition)."""
    yield from _read_table(file, delimiter="\t", quoting=csv.QUOTE_NONE)


def _read_table(file: Path, **dialect: Any) -> Iterator[Record]:
    csv.field_size_limit(2**31 - 1)  # the default of 128 KiB is shorter than many a document
    with file.open(encoding="utf-8-sig", newline="") as lines:
        rows = csv.reader(lines, **dialect)
        header = next(rows, [])
        if twice := sorted(name for name, count in Counter(header).items() if count > 1):
            raise UserError(f"file {file} has more than one column {twice[0]}; rename one")
        for number, row in enumerate((row for row in rows if row), start=1):
            if len(row) != len(header):
                raise UserError(
                    f"{file}, record {number} (line {rows.line_num}) has {len(row)} fields, "
                    f"the header {len(header)}: {', '.join(header)}"
                )
            yield dict(zip(header, row, strict=True))


def _read_text(file: Path) -> Iterator[Record]:
    """The whole file is one document."""
    text = file.read_text(encoding="utf-8-sig")
    if text:
        yield {"text": text}


def _read_parquet(file: Path) -> Iterator[Record]:
    import datasets
    from pyarrow import ArrowException

    try:
        yield from datasets.load_dataset(
            "parquet", data_files=glob.escape(str(file)), split="train", streaming=True
        )
    except ArrowException as error:
        raise UserError(f"file {file} is not valid parquet: {error}") from None


_READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".txt": _read_text,
}
ENDINGS = tuple(_READERS)
