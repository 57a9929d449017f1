"""Token cache: documents on disk, written once and memory-mapped by every process.

A directory ``<root>/<key>/`` holds the documents of one source, concatenated in order::

    tokens.npy   int32 [T]      all documents joined
    mask.npy     uint8 [T]      1: the token contributes to the loss; with labels: token type id
    offsets.npy  int64 [D + 1]  document d is tokens[offsets[d] : offsets[d + 1]]
    places.npy   int64 [D, 2]   number of the file in meta.json, number of the record in it
    classes.npy  int64 [D]      index of the label among the source's labels; -1: no label
    meta.json                   files, notes for the user, sha256 of the contents; xxh3 of each
                                array file and of all the rest of meta.json

A finished temporary directory is renamed into place, so an entry is complete or absent even when
several processes build it at the same time. A lock (``data.build_lock``) makes the others, also
those of other hosts, wait instead of repeating the work.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import time
import uuid
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
import psutil
import xxhash
from numpy.lib import format as npy
from numpy.typing import NDArray

from dist_peft.core.errors import UserError
from dist_peft.core.log import ONCE
from dist_peft.core.machine import identify_machine
from dist_peft.core.progress_beat import mark_progress
from dist_peft.core.stop_signals import raise_if_stop_requested
from dist_peft.data.build_lock import hold_build_lock
from dist_peft.data.files import RecordPlace

__all__ = ["DocumentWriter", "TokenDocuments", "find_cache_root", "load_or_build_documents"]

_LOG = logging.getLogger("dist_peft")

_ARRAYS = ("tokens", "mask", "offsets", "places", "classes")
_ABANDONED_SECONDS = 24 * 3600.0
_BUFFERED = 4 * 4096
"""Integers about documents that wait to be written."""
_HASHED_BYTES = 4 * 2**20
"""Block size for reading files to hash, in bytes."""


@dataclass(frozen=True)
class TokenDocuments:
    """The token documents of one source; the arrays are read-only views of files.

    Attributes:
        tokens: int32 [T]. mask: uint8 [T]. offsets: int64 [D + 1]. places: int64 [D, 2].
        classes: int64 [D].
        files: names for messages. is_text: plain text, which may be split into chunks.
        notes: one-time warnings for the user. digest: sha256 of the contents.
        largest_token: largest token id, to check it against the model's embedding.
        chat_template: the template used for conversations, if it is not the tokenizer's.
    """

    tokens: NDArray[np.int32]
    mask: NDArray[np.uint8]
    offsets: NDArray[np.int64]
    places: NDArray[np.int64]
    files: tuple[str, ...]
    is_text: bool
    notes: tuple[str, ...]
    digest: str
    largest_token: int = 0
    chat_template: str | None = None
    classes: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def get_place(self, index: int) -> RecordPlace:
        file, number = self.places[index].tolist()
        return RecordPlace(self.files[file], number)

    def find_place(self, token: int) -> RecordPlace:
        """Return the place of the record that token number ``token`` was made of."""
        return self.get_place(int(np.searchsorted(self.offsets, token, side="right")) - 1)


_DEFAULT_ROOT = Path("~/.cache/dist_peft/tokens")
"""Of one user, whose data it holds: made with mode 0700."""


def find_cache_root(configured: str | None) -> Path:
    """Return the directory of all entries: ``tokens`` in the configured cache directory.

    The cache directory is ``data.cache_dir``, else ``$DIST_PEFT_CACHE``, else
    ``~/.cache/dist_peft``.
    """
    root = configured or os.environ.get("DIST_PEFT_CACHE")
    return Path(root).expanduser() / "tokens" if root else _DEFAULT_ROOT.expanduser()


def load_or_build_documents(
    root: Path, key: str, build: Callable[["DocumentWriter"], None]
) -> TokenDocuments:
    """Return the documents stored under ``key``; call ``build`` if they are absent or damaged.

    Raises:
        UserError: from ``build``; or the cache cannot be written (permissions, disk space).
    """
    final = root / key
    stored = _open_documents(final, warn=True)
    if stored is not None:
        return stored
    with _explain_write_errors(root):
        root.mkdir(0o700 if root == _DEFAULT_ROOT.expanduser() else 0o777, True, True)
    with hold_build_lock(root / f".{key}.lease", mark_progress):
        # another process may have built it while this one waited
        return _open_documents(final) or _build_documents(final, build)


@contextmanager
def _explain_write_errors(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"token cache {directory} cannot be written: {error.strerror or error}; set "
            "data.cache_dir (or DIST_PEFT_CACHE) to a directory with space that you may write"
        ) from error


def _build_documents(final: Path, build: Callable[["DocumentWriter"], None]) -> TokenDocuments:
    owner = f"{_hash_machine()}-{os.getpid()}"
    temporary = final.with_name(f"{final.name}.tmp-{owner}-{uuid.uuid4().hex[:12]}")
    try:
        with _explain_write_errors(final.parent):
            _remove_abandoned(final.parent)
            temporary.mkdir()
            writer = DocumentWriter(temporary)
        with writer:
            build(writer)
        with _explain_write_errors(final.parent):
            _publish_directory(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    stored = _open_documents(final)
    if stored is None:
        raise RuntimeError(f"token cache {final} is not readable right after it was written")
    return stored


def _hash_machine() -> str:
    return xxhash.xxh3_64_hexdigest(identify_machine().encode())


def _remove_abandoned(root: Path) -> None:
    """Remove temporary directories of processes that were killed.

    Of this machine those whose process has ended; of others, and of unknown ones, those in which
    nothing was created for a day.
    """
    for path in root.glob("*.tmp-*"):
        found = re.search(r"\.tmp-([0-9a-f]*)-(\d+)-[0-9a-f]{12}(-damaged)?$", path.name)
        with suppress(OSError):
            if found is not None and found[1] == _hash_machine():
                abandoned = not psutil.pid_exists(int(found[2]))
            else:
                abandoned = time.time() - path.stat().st_mtime > _ABANDONED_SECONDS
            if abandoned:
                shutil.rmtree(path, ignore_errors=True)


def _publish_directory(temporary: Path, final: Path) -> None:
    """Rename to ``final``; keep an existing entry if it is valid, else replace it."""
    if final.exists() and _open_documents(final) is None:
        damaged = temporary.with_name(temporary.name + "-damaged")
        os.rename(final, damaged)
        shutil.rmtree(damaged, ignore_errors=True)
    try:
        os.rename(temporary, final)
    except OSError:
        if _open_documents(final) is None:
            raise
    directory = os.open(final.parent, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)


def _open_documents(directory: Path, *, warn: bool = False) -> TokenDocuments | None:
    """Open an entry; None if it is absent, truncated, inconsistent or altered.

    Every byte is verified against its stored hash, which reads the files once (500 MB took 0.08 s
    from the page cache).

    Args:
        warn: log an altered entry; the calls that check again under the lock do not.
    """
    try:
        meta = json.loads((directory / "meta.json").read_text(encoding="utf-8"))
        stored, found = meta.pop("hashes"), _hash_files(directory, meta)
        if altered := sorted(name for name in found if found[name] != stored.get(name)):
            if warn:
                _LOG.warning(
                    "token cache %s is not as it was written (%s): the data are tokenized again",
                    directory,
                    ", ".join(altered),
                    extra=ONCE,
                )
            return None
        documents = TokenDocuments(
            **{
                name: np.load(directory / f"{name}.npy", mmap_mode="r", allow_pickle=False)
                for name in _ARRAYS
            },
            files=tuple(meta["files"]),
            is_text=meta["is_text"],
            notes=tuple(meta["notes"]),
            digest=meta["digest"],
            largest_token=meta["largest_token"],
            chat_template=meta["chat_template"],
        )
        return documents if _is_consistent(documents) else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, EOFError):
        return None


def _hash_files(directory: Path, meta: dict[str, Any]) -> dict[str, str]:
    """Return the xxh3 hash (128 bits) of each array file, and of ``meta``."""
    found = {"meta.json": xxhash.xxh3_128_hexdigest(json.dumps(meta, sort_keys=True).encode())}
    for name in _ARRAYS:
        digest = xxhash.xxh3_128()
        with (directory / f"{name}.npy").open("rb") as file:
            while block := file.read(_HASHED_BYTES):
                digest.update(block)
        found[f"{name}.npy"] = digest.hexdigest()
    return found


def _is_consistent(d: TokenDocuments) -> bool:
    kinds = [str(array.dtype) for array in (d.tokens, d.mask, d.offsets, d.places, d.classes)]
    return (
        kinds == ["int32", "uint8", "int64", "int64", "int64"]
        and d.tokens.ndim == d.mask.ndim == d.offsets.ndim == 1
        and len(d.tokens) == len(d.mask) == int(d.offsets[-1])
        and int(d.offsets[0]) == 0
        and bool((np.diff(d.offsets) > 0).all())
        and d.places.shape == (len(d), 2)
        and d.classes.shape == (len(d),)
        and int(d.places[:, 0].max()) < len(d.files)
    )


class DocumentWriter:
    """Write the documents of one source as they arrive (context manager)."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._tokens = _NpyArrayWriter(directory / "tokens.npy", np.dtype(np.int32))
        self._mask = _NpyArrayWriter(directory / "mask.npy", np.dtype(np.uint8))
        self._offsets = _NpyArrayWriter(directory / "offsets.npy", np.dtype(np.int64))
        self._places = _NpyArrayWriter(directory / "places.npy", np.dtype(np.int64), width=2)
        self._classes = _NpyArrayWriter(directory / "classes.npy", np.dtype(np.int64))
        self._offsets.append_values(np.zeros(1, np.int64))
        self._rows = array("q")  # (end, file, number, class) of the documents to be written next
        self._count = self._end = 0
        self._has_classes = False
        self._files: dict[str, int] = {}
        self._largest = 0
        self.is_text = False
        self.notes: list[str] = []
        self.chat_template: str | None = None

    def __len__(self) -> int:
        return self._count

    def append_document(
        self,
        tokens: NDArray[np.int32],
        mask: NDArray[np.uint8],
        place: RecordPlace,
        label: int = -1,
    ) -> None:
        """Append a document of at least one token; ``mask`` has its shape [T].

        Raises:
            StopRequested: a signal has reached this process.
        """
        raise_if_stop_requested()
        mark_progress()
        assert len(tokens) == len(mask) > 0
        with _explain_write_errors(self._directory.parent):
            self._tokens.append_values(tokens)
            self._mask.append_values(mask)
        self._largest = max(self._largest, int(tokens.max()))
        self._count += 1
        self._end += len(tokens)
        self._has_classes |= label >= 0
        number = self._files.setdefault(place.file, len(self._files))
        self._rows.extend((self._end, number, place.number, label))
        if len(self._rows) >= _BUFFERED:
            self._write_rows()

    def _write_rows(self) -> None:
        rows = np.array(self._rows, np.int64).reshape(-1, 4)
        self._rows = array("q")
        with _explain_write_errors(self._directory.parent):
            self._offsets.append_values(rows[:, 0])
            self._places.append_values(rows[:, 1:3])
            self._classes.append_values(rows[:, 3])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with _explain_write_errors(self._directory.parent):
            if kind is None:
                self._write_rows()
            for name in _ARRAYS:
                getattr(self, f"_{name}").close_file()
            if kind is None:
                self._finish_entry()

    def _finish_entry(self) -> None:
        digest = hashlib.sha256(self._tokens.finish_digest() + self._mask.finish_digest())
        for name in ("offsets", "classes") if self._has_classes else ("offsets",):
            stored = np.load(self._directory / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            digest.update(stored)
        meta: dict[str, Any] = {
            "files": list(self._files),
            "is_text": self.is_text,
            "notes": self.notes,
            "digest": digest.hexdigest(),
            "largest_token": self._largest,
            "chat_template": self.chat_template,
        }
        meta["hashes"] = _hash_files(self._directory, meta)
        with (self._directory / "meta.json").open("w", encoding="utf-8") as text:
            json.dump(meta, text, indent=1)
            _sync_file(text)


class _NpyArrayWriter:
    """A .npy file whose length is known only at the end; with ``width`` [length, width].

    numpy pads the header so that the length can grow, so the header is overwritten in place.
    """

    def __init__(self, path: Path, dtype: np.dtype[Any], width: int | None = None) -> None:
        self._file = path.open("wb")
        self._dtype = dtype
        self._rest = () if width is None else (width,)
        self._length = 0
        self._hash = hashlib.sha256()
        self._write_header()

    def _write_header(self) -> None:
        npy.write_array_header_1_0(
            self._file,
            {
                "descr": self._dtype.str,
                "fortran_order": False,
                "shape": (self._length, *self._rest),
            },
        )

    def append_values(self, values: NDArray[Any]) -> None:
        assert values.dtype == self._dtype
        assert values.shape[1:] == self._rest
        data = values.tobytes()
        self._file.write(data)
        self._hash.update(data)
        self._length += len(values)

    def finish_digest(self) -> bytes:
        return self._hash.digest()

    def close_file(self) -> None:
        self._file.seek(0)
        self._write_header()
        _sync_file(self._file)
        self._file.close()


def _sync_file(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())
