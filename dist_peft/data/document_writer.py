"""Write the token documents of one source to the arrays of a cache entry (see ``cache``)."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
import xxhash
from numpy.lib import format as npy
from numpy.typing import NDArray

from dist_peft.core.errors import UserError
from dist_peft.core.progress_beat import mark_progress
from dist_peft.core.stop_signals import raise_if_stop_requested
from dist_peft.data.document_batch import DocumentBatch

__all__ = ["ENTRY_ARRAYS", "DocumentWriter", "explain_write_errors", "hash_entry_files"]

ENTRY_ARRAYS = ("tokens", "mask", "offsets", "places", "classes")
"""Each is a file of an entry."""

_HASHED_BYTES = 4 * 2**20
"""Block size for reading files to hash, in bytes."""


@contextmanager
def explain_write_errors(directory: Path) -> Iterator[None]:
    """Turn errors of writing below the cache ``directory`` into a ``UserError``."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"token cache {directory} cannot be written: {error.strerror or error}; set "
            "data.cache_dir (or DIST_PEFT_CACHE) to a directory with space that you may write"
        ) from error


def hash_entry_files(directory: Path, meta: dict[str, Any]) -> dict[str, str]:
    """Return the xxh3 hash (128 bits) of each array file, and of ``meta``."""
    found = {"meta.json": xxhash.xxh3_128_hexdigest(json.dumps(meta, sort_keys=True).encode())}
    for name in ENTRY_ARRAYS:
        digest = xxhash.xxh3_128()
        with (directory / f"{name}.npy").open("rb") as file:
            while block := file.read(_HASHED_BYTES):
                digest.update(block)
        found[f"{name}.npy"] = digest.hexdigest()
    return found


class DocumentWriter:
    """Write the documents of one source as they arrive (context manager).

    Attributes:
        is_text: plain text, which may be split into chunks.
        notes: one-time warnings for the user.
        chat_template: the template used for conversations, if it is not the tokenizer's.
        has_conversations: whether documents were rendered with a chat template.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._tokens = _NpyArrayWriter(directory / "tokens.npy", np.dtype(np.int32), hashed=True)
        self._mask = _NpyArrayWriter(directory / "mask.npy", np.dtype(np.uint8), hashed=True)
        self._offsets = _NpyArrayWriter(directory / "offsets.npy", np.dtype(np.int64))
        self._places = _NpyArrayWriter(directory / "places.npy", np.dtype(np.int64), width=2)
        self._classes = _NpyArrayWriter(directory / "classes.npy", np.dtype(np.int64))
        self._offsets.append_values(np.zeros(1, np.int64))
        self._count = self._end = 0
        self._has_classes = False
        self._files: dict[str, int] = {}
        self._largest = 0
        self.is_text = False
        self.notes: list[str] = []
        self.chat_template: str | None = None
        self.has_conversations = False

    def __len__(self) -> int:
        return self._count

    def append_documents(self, batch: DocumentBatch) -> None:
        """Append documents of at least one token each.

        Raises:
            StopRequested: a signal has reached this process.
        """
        raise_if_stop_requested()
        mark_progress()
        documents = batch.documents
        if not len(documents):
            return
        assert len(documents.tokens) == len(documents.mask) == documents.lengths.sum()
        assert documents.lengths.min() > 0
        file = self._files.setdefault(batch.file, len(self._files))
        places = np.stack([np.full(len(documents), file), batch.numbers], axis=1)
        ends = self._end + np.cumsum(documents.lengths)
        with explain_write_errors(self._directory.parent):
            self._tokens.append_values(documents.tokens)
            self._mask.append_values(documents.mask)
            self._offsets.append_values(ends)
            self._places.append_values(places)
            self._classes.append_values(batch.classes)
        self._largest = max(self._largest, int(documents.tokens.max()))
        self._count += len(documents)
        self._end = int(ends[-1])
        self._has_classes |= bool(batch.classes.max() >= 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with explain_write_errors(self._directory.parent):
            for name in ENTRY_ARRAYS:
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
            "has_conversations": self.has_conversations,
        }
        meta["hashes"] = hash_entry_files(self._directory, meta)
        with (self._directory / "meta.json").open("w", encoding="utf-8") as text:
            json.dump(meta, text, indent=1)
            _sync_file(text)


class _NpyArrayWriter:
    """A .npy file whose length is known only at the end; with ``width`` [length, width].

    numpy pads the header so that the length can grow, so the header is overwritten in place.
    """

    def __init__(
        self, path: Path, dtype: np.dtype[Any], width: int | None = None, *, hashed: bool = False
    ) -> None:
        self._file = path.open("wb")
        self._dtype = dtype
        self._rest = () if width is None else (width,)
        self._length = 0
        self._hash = hashlib.sha256() if hashed else None
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
        data = np.ascontiguousarray(values).data
        self._file.write(data)
        if self._hash is not None:
            self._hash.update(data)
        self._length += len(values)

    def finish_digest(self) -> bytes:
        assert self._hash is not None
        return self._hash.digest()

    def close_file(self) -> None:
        self._file.seek(0)
        self._write_header()
        _sync_file(self._file)
        self._file.close()


def _sync_file(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())
