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

import json
import logging
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
import xxhash
from numpy.typing import NDArray

from dist_peft.core.log import ONCE
from dist_peft.core.machine import identify_machine
from dist_peft.core.progress_beat import mark_progress
from dist_peft.data.build_lock import hold_build_lock
from dist_peft.data.document_writer import (
    ENTRY_ARRAYS,
    DocumentWriter,
    explain_write_errors,
    hash_entry_files,
)
from dist_peft.data.files import RecordPlace

__all__ = [
    "DocumentWriter",
    "TokenDocuments",
    "combine_sources",
    "find_cache_root",
    "load_or_build_documents",
]

_LOG = logging.getLogger("dist_peft")

_ABANDONED_SECONDS = 24 * 3600.0


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
        has_conversations: whether documents were rendered with a chat template; None: unknown, in
            an entry of an earlier version.
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
    has_conversations: bool | None = None
    classes: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def get_place(self, index: int) -> RecordPlace:
        file, number = self.places[index].tolist()
        return RecordPlace(self.files[file], number)

    def find_place(self, token: int) -> RecordPlace:
        """Return the place of the record that token number ``token`` was made of."""
        return self.get_place(int(np.searchsorted(self.offsets, token, side="right")) - 1)


def combine_sources(values: Iterable[bool | None]) -> bool | None:
    """Return whether any is true; None where none is, and one is unknown."""
    found = list(values)
    return True if any(found) else None if None in found else False


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
    root: Path, key: str, build: Callable[[DocumentWriter], None]
) -> TokenDocuments:
    """Return the documents stored under ``key``; call ``build`` if they are absent or damaged.

    Raises:
        UserError: from ``build``; or the cache cannot be written (permissions, disk space).
    """
    final = root / key
    stored = _open_documents(final, warn=True)
    if stored is not None:
        return stored
    with explain_write_errors(root):
        root.mkdir(0o700 if root == _DEFAULT_ROOT.expanduser() else 0o777, True, True)
    with hold_build_lock(root / f".{key}.lease", mark_progress):
        # another process may have built it while this one waited
        return _open_documents(final) or _build_documents(final, build)


def _build_documents(final: Path, build: Callable[[DocumentWriter], None]) -> TokenDocuments:
    owner = f"{_hash_machine()}-{os.getpid()}"
    temporary = final.with_name(f"{final.name}.tmp-{owner}-{uuid.uuid4().hex[:12]}")
    try:
        with explain_write_errors(final.parent):
            _remove_abandoned(final.parent)
            temporary.mkdir()
            writer = DocumentWriter(temporary)
        with writer:
            build(writer)
        with explain_write_errors(final.parent):
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
        stored, found = meta.pop("hashes"), hash_entry_files(directory, meta)
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
                for name in ENTRY_ARRAYS
            },
            files=tuple(meta["files"]),
            is_text=meta["is_text"],
            notes=tuple(meta["notes"]),
            digest=meta["digest"],
            largest_token=meta["largest_token"],
            chat_template=meta["chat_template"],
            has_conversations=meta.get("has_conversations"),
        )
        return documents if _is_consistent(documents) else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, EOFError):
        return None


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
