"""Write models larger than memory: rows in any order, whole files or none.

Types and shapes are known before the first row, so every header and every offset is fixed when the
writer opens; a row goes straight to its place. The files grow under temporary names::

    .model-00001-of-00002.safetensors.1f2e3d4c.tmp  --close: fsync, rename-->  model-00001-of-...

and appear under their own only when each row was written exactly once and is on the disk. The
index json is renamed last: shards without it are refused by every reader, so a crash between two
renames leaves no model that looks complete.
"""

import json
import math
import os
import re
import shutil
from bisect import bisect
from collections.abc import Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Self

import torch
from torch import Tensor

from dist_peft.core.errors import UserError
from dist_peft.core.span import Span
from dist_peft.store.fileio import (
    OpenFiles,
    make_temporary_name,
    sync_directory,
    translate_write_errors,
    write_exactly,
)
from dist_peft.store.format import TensorInfo, TensorSpec, build_header
from dist_peft.store.index import INDEX_NAME, SINGLE_NAME

__all__ = ["MAX_FILE_BYTES", "StreamWriter", "TensorSpec", "write_atomically"]

MAX_FILE_BYTES = 5 * 10**9
"""Size of a weight file at which models are split into several."""

_MODEL_FILE = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


def write_atomically(path: Path, data: bytes | str, *, private: bool = False) -> None:
    """Write a small file so that ``path`` has its old content or all of the new, never a part.

    Args:
        private: for texts of the data: mode 0600, else as the umask says.

    Raises:
        UserError: disk full, no permission, or no such directory.
    """
    content = data.encode() if isinstance(data, str) else data
    temporary = make_temporary_name(path)
    with translate_write_errors(path, len(content)):
        try:
            _create_file(temporary, content, len(content), 0o600 if private else 0o666)
            _sync_file(temporary)
            os.replace(temporary, path)
            sync_directory(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


class StreamWriter:
    """Writer of ``model.safetensors``, or numbered shards and ``model.safetensors.index.json``.

    Threads may write different tensors at the same time.

    A context manager: leaving it normally closes (checks and publishes), leaving it by an exception
    removes the files. They equal those of ``safetensors.torch.save_file``, byte for
    byte.

    Attributes:
        directory: output directory; created when missing.
        files: the final paths, in the order of the shards.
    """

    def __init__(
        self,
        directory: Path,
        tensors: Sequence[TensorSpec],
        max_file_bytes: int = MAX_FILE_BYTES,
        metadata: Mapping[str, str] = MappingProxyType({"format": "pt"}),
    ) -> None:
        """Plan the files and create them at full size, without data.

        Args:
            directory: output directory.
            tensors: everything that will be written; names are unique.
            max_file_bytes: most bytes of tensors in a file. A tensor is never split, so one that is
                larger has a file of its own.
            metadata: the header's ``__metadata__``; transformers wants its ``format``.

        Raises:
            UserError: too little space, no permission, or the directory holds a model's files that
                the new ones would not replace.
            ValueError: two tensors of one name, or a type that safetensors lacks.
        """
        if len({spec.name for spec in tensors}) < len(tensors):
            raise ValueError("two tensors have the same name")
        self.directory = directory
        plan = _split_into_files(tensors, max_file_bytes)
        names = _list_file_names(len(plan))
        self.files = tuple(directory / name for name in names)
        self._places: dict[str, _TensorPlace] = {}
        self._parts: list[_OutputFile] = []
        for file, specs in zip(self.files, plan, strict=True):
            temporary = make_temporary_name(file)
            header, infos = build_header(specs, metadata, temporary)
            size = infos[-1].stop if infos else len(header)
            self._parts.append(_OutputFile(file, temporary, header, size))
            self._places.update({info.name: _TensorPlace(info, file) for info in infos})
        if len(plan) > 1:
            index, text = directory / INDEX_NAME, _build_index_json(plan, names)
            self._parts.append(_OutputFile(index, make_temporary_name(index), text, len(text)))
        self._total_bytes = sum(part.size for part in self._parts)
        self._open_files = OpenFiles(os.O_WRONLY)
        self._is_open = True
        self._create_files()

    def _create_files(self) -> None:
        self._made_directory = not self.directory.exists()
        with translate_write_errors(self.directory, self._total_bytes):
            self.directory.mkdir(parents=True, exist_ok=True)
            _refuse_leftover_files(self.directory, {part.final for part in self._parts})
        usage = shutil.disk_usage(self.directory)
        # file systems that do not know their size report 0
        if usage.total and usage.free < self._total_bytes:
            raise UserError(
                f"writing {self.files[0]} needs {self._total_bytes:,} bytes in all, "
                f"{usage.free:,} are free in {self.directory}; free space or choose another "
                "directory"
            )
        try:
            for part in self._parts:
                with translate_write_errors(part.final, self._total_bytes):
                    _create_file(part.temporary, part.first, part.size)
        except BaseException:
            self._discard_files()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
        else:
            self._discard_files()

    def write_rows(self, name: str, rows: Tensor, start: int = 0) -> None:
        """Write rows ``[start, start + len(rows))`` of a tensor.

        Args:
            name: one of the planned tensors.
            rows: ``[n, *shape[1:]]`` (``[]`` for a 0-d tensor) in the planned type, on any device;
                or rows ``[n, shape[-1]]`` of a tensor of more than two dimensions.
            start: first row, of the kind that ``rows`` has.

        Raises:
            UserError: the disk is full.
            ValueError: unknown name, other type or shape, rows outside the tensor or written
                before, or the writer is closed.
        """
        if not self._is_open:
            raise ValueError(f"tensor {name}: the writer is closed")
        if name not in self._places:
            raise ValueError(f"tensor {name} was not planned")
        place = self._places[name]
        info = place.info
        if rows.dtype != info.dtype:
            raise ValueError(f"tensor {name} has type {info.dtype}, not {rows.dtype}")
        inner = place.inner_rows
        if rows.ndim == 2 < len(info.shape) and rows.shape[1] == info.shape[-1]:
            inner = 1
        elif rows.shape[1:] != info.shape[1:] or rows.ndim != len(info.shape):
            raise ValueError(f"tensor {name} has shape {info.shape}, rows {tuple(rows.shape)}")
        span = Span(start * inner, (start + (len(rows) if rows.ndim else 1)) * inner)
        if span.stop > place.num_rows:
            raise ValueError(f"tensor {name} of shape {info.shape} has no {span}")
        place.written.add_span(span, name)
        data = rows.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        if data.numel():
            offset = info.start + span.start * (info.row_bytes // place.inner_rows)
            with (
                translate_write_errors(place.final, self._total_bytes),
                self._open_files.hold_descriptor(info.file) as descriptor,
            ):
                write_exactly(descriptor, data.numpy().data, offset)

    def close(self) -> None:
        """Check that every row was written, then publish the files. Idempotent.

        Raises:
            ValueError: rows are missing; nothing is published.
            UserError: the disk is full.
        """
        if not self._is_open:
            return
        try:
            for name, place in self._places.items():
                place.written.check_complete(place.num_rows, name)
            for part in self._parts:
                with translate_write_errors(part.final, self._total_bytes):
                    _sync_file(part.temporary)
            self._publish_files()
        finally:
            self._discard_files()

    def _publish_files(self) -> None:
        # an older index must not vouch for a mixture of its shards and ours
        (self.directory / INDEX_NAME).unlink(missing_ok=True)
        for part in self._parts:
            with translate_write_errors(part.final, self._total_bytes):
                os.replace(part.temporary, part.final)
        sync_directory(self.directory)

    def _discard_files(self) -> None:
        self._is_open = False
        self._open_files.close()
        for part in self._parts:
            part.temporary.unlink(missing_ok=True)
        if self._made_directory:
            with suppress(OSError):  # not empty: it holds published files
                self.directory.rmdir()


@dataclass
class _WrittenRows:
    """The rows written so far: sorted, disjoint spans with gaps between them."""

    spans: list[Span] = field(default_factory=list)

    def add_span(self, span: Span, name: str) -> None:
        if not len(span):
            return
        at = bisect(self.spans, span.start, key=lambda s: s.start)
        before, after = self.spans[:at][-1:], self.spans[at : at + 1]
        if any(len(span.intersect(other)) for other in [*before, *after]):
            raise ValueError(f"tensor {name}: some of {span} was written before")
        if before and before[0].stop == span.start:
            at, span = at - 1, Span(before[0].start, span.stop)
            del self.spans[at]
        if after and after[0].start == span.stop:
            span = Span(span.start, after[0].stop)
            del self.spans[at]
        self.spans.insert(at, span)

    def check_complete(self, rows: int, name: str) -> None:
        if self.spans != ([Span(0, rows)] if rows else []):
            count = rows - sum(map(len, self.spans))
            raise ValueError(f"tensor {name}: {count} of {rows} rows were never written")


@dataclass(frozen=True)
class _OutputFile:
    """One of the files to publish; it begins with the bytes ``first``."""

    final: Path
    temporary: Path
    first: bytes
    size: int


@dataclass(frozen=True)
class _TensorPlace:
    info: TensorInfo  # inside the temporary file
    final: Path
    written: _WrittenRows = field(default_factory=_WrittenRows)

    @property
    def inner_rows(self) -> int:
        """Rows of the last dimension in one of the first."""
        return max(1, math.prod(self.info.shape[1:-1]))

    @property
    def num_rows(self) -> int:
        """Rows of the last dimension; of a vector its elements."""
        return self.info.num_rows * self.inner_rows


def _split_into_files(tensors: Sequence[TensorSpec], max_file_bytes: int) -> list[list[TensorSpec]]:
    """Split consecutive tensors into files, as many a file as fit; at least one file."""
    files: list[list[TensorSpec]] = [[]]
    used = 0
    for spec in tensors:
        if files[-1] and used + spec.num_bytes > max_file_bytes:
            files.append([])
            used = 0
        files[-1].append(spec)
        used += spec.num_bytes
    return files


def _list_file_names(count: int) -> list[str]:
    if count == 1:
        return [SINGLE_NAME]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def _build_index_json(plan: list[list[TensorSpec]], names: list[str]) -> bytes:
    """Return the index of a sharded model, written as ``transformers`` writes it."""
    places = {spec.name: name for specs, name in zip(plan, names, strict=True) for spec in specs}
    total = sum(spec.num_bytes for specs in plan for spec in specs)
    tree = {"metadata": {"total_size": total}, "weight_map": places}
    return (json.dumps(tree, indent=2, sort_keys=True) + "\n").encode()


def _refuse_leftover_files(directory: Path, planned: Set[Path]) -> None:
    """Refuse a directory whose older files would stay and be mixed with the new ones."""
    stale = sorted(
        file.name
        for file in directory.iterdir()
        if _MODEL_FILE.fullmatch(file.name) and file not in planned
    )
    if stale:
        raise UserError(
            f"{directory} holds a model in other files ({', '.join(stale[:3])}"
            f"{', ...' if len(stale) > 3 else ''}) that would be mixed with the new ones; "
            "remove them or choose another directory"
        )


def _create_file(file: Path, first: bytes, size: int, mode: int = 0o666) -> None:
    """Create a file of ``size`` bytes that begins with ``first``; the umask narrows ``mode``."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        os.ftruncate(descriptor, size)
        write_exactly(descriptor, memoryview(first), 0)
    finally:
        os.close(descriptor)


def _sync_file(file: Path) -> None:
    descriptor = os.open(file, os.O_WRONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
