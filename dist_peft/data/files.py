"""Resolve the path of a source to files or a Hub data set; ``readers`` reads each file."""

import glob
import json
import logging
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from dist_peft.core.config.run import DataSource
from dist_peft.core.errors import UserError
from dist_peft.core.input_paths import refuse_special_file, refuse_special_files
from dist_peft.core.log import ONCE
from dist_peft.data.readers import (
    COMPRESSIONS,
    ENDINGS,
    find_data_ending,
    is_table,
    read_file_blocks,
)
from dist_peft.data.record_blocks import ArrowRecords, Record, RecordBlock, split_arrow_batch

if TYPE_CHECKING:
    import datasets

__all__ = [
    "ENDINGS",
    "Record",
    "RecordChunk",
    "RecordPlace",
    "RecordSource",
    "open_source",
    "read_chunks",
    "read_records",
]

_LOG = logging.getLogger("dist_peft")

_HUB_ID = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+))?")

_ABOUT_DATA = ("dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json")
"""Metadata files that ``datasets`` writes next to the data."""

_ROWS = 1024
"""Rows of a Hub data set in a slice of its memory-mapped files."""

_READABLE = f"{', '.join(ENDINGS)}; text formats also as {' and '.join(COMPRESSIONS)}"


class RecordPlace(NamedTuple):
    """Position of a record: ``file`` as the user wrote it, ``number`` counted from 1."""

    file: str
    number: int

    def __str__(self) -> str:
        return f"{self.file}, record {self.number}"


@dataclass(frozen=True)
class RecordChunk:
    """Consecutive records of one file, not parsed yet; it can be sent to another process.

    Attributes:
        file: name for messages. first: number of the first record in it, from 1.
        count: of the records to read; the block may hold more.
    """

    file: str
    first: int
    count: int
    block: RecordBlock

    def read_records(self) -> Iterator[tuple[RecordPlace, Record]]:
        """Yield each record with its place.

        Raises:
            UserError: invalid contents, naming file and line or record.
        """
        numbers = range(self.first, self.first + self.count)
        # the numbers first: zip must not parse a record beyond them
        for number, record in zip(numbers, self.block.parse_records(), strict=False):
            yield RecordPlace(self.file, number), record


class RecordSource(Protocol):
    """The resolved files or data set of a source, not read yet."""

    def list_fingerprints(self) -> list[list[str | int]]:
        """Return absolute path, size and modification time of each file, for the cache key.

        A file replaced by another of the same size and the same time is not noticed.
        """

    def iterate_files(self) -> Iterator[tuple[str, Iterator[RecordBlock]]]:
        """Yield, for each file, its name for messages and its records."""


@dataclass(frozen=True)
class LocalFileSource:
    """Local files with known extensions, sorted.

    Attributes:
        column_names: of tables without a header line; empty: they have one.
    """

    files: tuple[Path, ...]
    column_names: tuple[str, ...] = ()

    def list_fingerprints(self) -> list[list[str | int]]:
        return _fingerprint_files(self.files)

    def iterate_files(self) -> Iterator[tuple[str, Iterator[RecordBlock]]]:
        for file in self.files:
            yield str(file), read_file_blocks(file, self.column_names)


@dataclass(frozen=True)
class HubSource:
    """A split of a Hub data set, in the cache of ``datasets``."""

    name: str
    data: "datasets.Dataset"

    def list_fingerprints(self) -> list[list[str | int]]:
        return _fingerprint_files(tuple(Path(file["filename"]) for file in self.data.cache_files))

    def iterate_files(self) -> Iterator[tuple[str, Iterator[RecordBlock]]]:
        yield self.name, self._iterate_blocks()

    def _iterate_blocks(self) -> Iterator[RecordBlock]:
        # as plain values: images and audio are not decoded
        for table in self.data.with_format("arrow").iter(batch_size=_ROWS):
            for batch in table.to_batches():
                for part in split_arrow_batch(batch):
                    yield ArrowRecords(None, part)


def open_source(source: DataSource, key: str) -> RecordSource:
    """Resolve ``source.path``: a file, a directory, a glob pattern or a Hub data set.

    Args:
        source: its ``path`` is the first that matches: a file; a directory that ``save_to_disk`` of
            ``datasets`` wrote (of several splits ``source.split``), any other directory (its own
            files, not those of subdirectories); a pattern (``**`` crosses directories);
            ``org/name`` or ``org/name:config`` of the Hub, unless ``org`` is a local directory.
        key: configuration key for messages, such as ``data.train[0]``.

    Raises:
        UserError: the path does not exist (raised without network access, unless it can be a Hub
            id), no file has a known extension, or the Hub data set cannot be loaded.
    """
    try:
        return _open_unchecked(source, key)
    except (OSError, RuntimeError) as error:  # RuntimeError: the home of an unknown user
        reason = str(getattr(error, "strerror", None) or error).lower()
        raise UserError(f"{key}: path {source.path:.200} cannot be accessed: {reason}") from None


def _open_unchecked(source: DataSource, key: str) -> RecordSource:
    path = source.path
    place = Path(path).expanduser()
    refuse_special_file(place)
    refuse_special_files(place)
    hub = None if place.exists() else _HUB_ID.fullmatch(path)
    if hub and find_data_ending(place) is None and not place.parent.is_dir():
        _refuse_column_names(source, source.path, key)
        return _open_hub_source(source, hub["name"], hub["config"], key)
    splits = _list_saved_splits(place, key)
    if splits is not None:
        if source.split not in splits:
            raise UserError(
                f"{key}: directory {path} has no split {source.split}; set {key}.split to one of "
                f"{', '.join(splits)}"
            )
        place = place / source.split
    elif source.split != "train":
        _LOG.warning(
            "%s.split has no effect: %s is local, not a Hub data set", key, path, extra=ONCE
        )
    saved = _list_saved_files(place, key)
    files = _locate_files(path, place, key) if saved is None else saved
    if other := next((file for file in files if not is_table(file)), None):
        _refuse_column_names(source, str(other), key)
    return LocalFileSource(files, tuple(source.column_names))


def _refuse_column_names(source: DataSource, other: str, key: str) -> None:
    if source.column_names:
        raise UserError(
            f"{key}.column_names is for .csv and .tsv files without a header line, and {other} is "
            "no such file; leave it out"
        )


def _locate_files(path: str, place: Path, key: str) -> tuple[Path, ...]:
    if place.is_file():
        if find_data_ending(place) is None:
            raise UserError(
                f"{key}: file {path} has the ending {''.join(place.suffixes[-2:]) or '(none)'}; "
                f"readable are {_READABLE}"
            )
        return (place,)
    if place.is_dir():
        found = [entry for entry in place.iterdir() if entry.is_file()]
        return _check_readable(found, f"{key}: directory {path}")
    if glob.has_magic(path):
        found = [Path(name) for name in glob.glob(str(place), recursive=True)]
        return _check_readable([f for f in found if f.is_file()], f"{key}: pattern {path}")
    raise UserError(
        f"{key}: file {path} does not exist (looked in {Path.cwd()}); "
        "give a file, a directory, a glob pattern, or a Hub data set as org/name"
    )


def _check_readable(files: list[Path], what: str) -> tuple[Path, ...]:
    data = [f for f in files if f.name not in _ABOUT_DATA]
    known = sorted(f for f in data if find_data_ending(f) is not None)
    if not known:
        others = sorted({f.suffix or f.name for f in files})[:5]
        raise UserError(
            f"{what} has no file with a readable ending ({_READABLE})"
            + (f"; it has {', '.join(others)}" if others else "")
        )
    return tuple(known)


# -- directories written by datasets' save_to_disk -------------------------------------------------


def _list_saved_splits(directory: Path, key: str) -> list[str] | None:
    """Return the splits of a ``DatasetDict`` saved in ``directory``; None if there is none."""
    file = directory / "dataset_dict.json"
    if not file.is_file():
        return None
    return _check_bare_names(_read_json_object(file, key).get("splits"), file, key)


def _list_saved_files(directory: Path, key: str) -> tuple[Path, ...] | None:
    """Return the Arrow files, in order, of a ``Dataset`` saved in ``directory``; None if none."""
    file = directory / "state.json"
    if not file.is_file():
        return None
    state = _read_json_object(file, key)
    if "_data_files" not in state:
        return None
    if state.get("_indices_data_files"):
        raise UserError(
            f"{key}: {directory} was saved by datasets 1.x with an index of rows; load it with "
            "datasets and save it again"
        )
    entries = state["_data_files"]
    if not isinstance(entries, list):
        entries = []
    names = [entry.get("filename") if isinstance(entry, dict) else None for entry in entries]
    files = [directory / name for name in _check_bare_names(names, file, key)]
    if missing := [f for f in files if not f.is_file()]:
        raise UserError(f"{key}: {missing[0]} is missing, which {file} names; copy it again")
    return tuple(files)


def _read_json_object(file: Path, key: str) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{key}: {file} is not valid JSON: {error}; copy it again") from None
    return found if isinstance(found, dict) else {}


def _check_bare_names(names: Any, file: Path, key: str) -> list[str]:
    """Return ``names`` if all are plain file names: an untrusted ``file`` must not use paths.

    Raises:
        UserError: they are missing, or one is a path.
    """
    named = isinstance(names, list) and bool(names)
    if not named or not all(isinstance(n, str) and Path(n).name == n for n in names):
        raise UserError(
            f"{key}: {file} does not name the files of its own directory; it is damaged, or was "
            "not written by datasets"
        )
    return list(names)


# -- the Hub ---------------------------------------------------------------------------------------


def _open_hub_source(source: DataSource, name: str, config: str | None, key: str) -> HubSource:
    import datasets  # here: its import takes a second, and most runs do not need it

    try:
        # mapped into memory, whatever the user's settings of datasets are: a set may be larger than
        # that, and the files are part of the key of the token cache
        data = datasets.load_dataset(name, config, split=source.split, keep_in_memory=False)
    # datasets has no common error class; these mean: no network, not found, unknown split or config
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError(
            f"{key}: {source.path} is not a local file, and as a Hub data set (split "
            f"{source.split}) it cannot be loaded: {reason}. Check the path, the name or the "
            "network; a configuration of a data set is written org/name:config"
        ) from None
    return HubSource(source.path, data)


def _fingerprint_files(files: tuple[Path, ...]) -> list[list[str | int]]:
    stats = [(file.resolve(), file.stat()) for file in files]
    return [[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in stats]


def read_chunks(opened: RecordSource, limit: int | None) -> Iterator[RecordChunk]:
    """Yield the first ``limit`` records (None: all) in file order, in chunks.

    Raises:
        UserError: unreadable file, naming it.
    """
    remaining = math.inf if limit is None else limit
    for file, blocks in opened.iterate_files():
        first = 1
        for block in blocks:
            count = int(min(len(block), remaining))
            yield RecordChunk(file, first, count, block)
            first += count
            remaining -= count
            if not remaining:
                return


def read_records(opened: RecordSource, limit: int | None) -> Iterator[tuple[RecordPlace, Record]]:
    """Yield the first ``limit`` records (None: all) in file order, each with its place.

    Raises:
        UserError: unreadable file, naming it and the line or record.
    """
    for chunk in read_chunks(opened, limit):
        yield from chunk.read_records()
