"""The safetensors file format, read and written without the library.

::

    0          8                      8 + N                                  end of file
    +----------+----------------------+--------------------------------------+
    | N: u64le | JSON header, N bytes | tensors, row-major, without any gap  |
    +----------+----------------------+--------------------------------------+

    {"__metadata__": {"format": "pt"},
     "weight": {"dtype": "BF16", "shape": [4, 8], "data_offsets": [0, 64]}}

``data_offsets`` count from the end of the header. Rows of a tensor are consecutive bytes, which is
why a rank can read its rows alone; the library's own reader maps the whole file instead. The
checks are those of the reference implementation (huggingface/safetensors, ``tensor.rs``): a header
of at most 100 MB, offsets that start at 0, follow each other and end with the file.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dist_peft.core.errors import UserError
from dist_peft.core.input_paths import refuse_special_file
from dist_peft.store.fileio import read_exactly, translate_read_errors

__all__ = ["DTYPES", "TensorInfo", "TensorSpec", "build_header", "read_tensor_infos"]

# In the order of the reference implementation, which lays tensors out from the last type to the
# first, so that wide types come first and stay aligned.
DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_RANKS = {dtype: rank for rank, dtype in enumerate(DTYPES.values())}
_MAX_HEADER_BYTES = 100_000_000
_METADATA = "__metadata__"


@dataclass(frozen=True)
class TensorSpec:
    """A tensor's name, type and shape, without its data."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_rows(self) -> int:
        """Length of dimension 0; a 0-d tensor counts as one row."""
        return self.shape[0] if self.shape else 1

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def num_bytes(self) -> int:
        return self.num_rows * self.row_bytes


@dataclass(frozen=True)
class TensorInfo(TensorSpec):
    """A tensor in a file; its bytes are ``[start, stop)``, counted from the file's beginning."""

    file: Path
    start: int
    stop: int


def read_tensor_infos(file: Path) -> list[TensorInfo]:
    """Return the tensors of one safetensors file, in the order of their bytes.

    Raises:
        UserError: missing, unreadable, truncated or corrupt, or a type that torch does not have.
    """
    refuse_special_file(file)
    with translate_read_errors(file):
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            size = os.fstat(descriptor).st_size
            header, begin = _read_header_json(descriptor, size, file)
        finally:
            os.close(descriptor)
    infos = [_parse_tensor_entry(name, entry, begin, file) for name, entry in header.items()]
    infos.sort(key=lambda info: (info.start, info.stop))
    _check_byte_layout(infos, begin, size, file)
    return infos


def _read_header_json(descriptor: int, size: int, file: Path) -> tuple[dict[str, Any], int]:
    """Return the header without its metadata, and the offset of the first data byte."""
    if size < 8:
        raise _truncated_file_error(file, f"it has {size} bytes, a header needs 8 and more")
    prefix = bytearray(8)
    read_exactly(descriptor, memoryview(prefix), 0, file)
    if prefix == b"version ":
        raise UserError(f"file {file} is a git-lfs pointer, not the data; run git lfs pull")
    length = int.from_bytes(prefix, "little")
    if length > _MAX_HEADER_BYTES:
        raise _corrupt_file_error(
            file, f"its header would have {length:,} bytes, at most 100 MB are allowed"
        )
    if 8 + length > size:
        raise _truncated_file_error(
            file, f"its header ends at byte {8 + length:,}, the file at {size:,}"
        )
    text = bytearray(length)
    read_exactly(descriptor, memoryview(text), 8, file)
    try:
        header = json.loads(text.decode(), object_pairs_hook=_refuse_duplicate_keys)
    except (ValueError, RecursionError) as error:
        raise _corrupt_file_error(file, f"its header is not valid JSON: {error}") from None
    if not isinstance(header, dict):
        raise _corrupt_file_error(file, "its header is not a JSON object")
    metadata = header.pop(_METADATA, None)  # null: there is none
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _corrupt_file_error(file, f"its {_METADATA} is no object of texts")
    return header, 8 + length


def _refuse_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        names = [key for key, _ in pairs]
        raise ValueError(f"two entries named {next(n for n in names if names.count(n) > 1)}")
    return unique


def _parse_tensor_entry(name: str, entry: Any, begin: int, file: Path) -> TensorInfo:
    where = f"tensor {name}"
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise _corrupt_file_error(file, f"{where} lacks dtype, shape or data_offsets")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not _are_valid_sizes(shape):
        raise _corrupt_file_error(file, f"{where} has shape {shape}")
    if not _are_valid_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _corrupt_file_error(file, f"{where} has data_offsets {offsets}")
    if not isinstance(code, str) or code not in DTYPES:
        raise UserError(
            f"tensor {name} in {file} has type {code}, which is not supported; "
            f"convert it to one of {', '.join(DTYPES)}"
        )
    start, stop = offsets
    info = TensorInfo(name, DTYPES[code], tuple(shape), file, begin + start, begin + stop)
    if info.num_bytes != stop - start:
        raise _corrupt_file_error(
            file,
            f"{where} of shape {shape} and type {code} has {info.num_bytes:,} bytes, "
            f"its data_offsets span {stop - start:,}",
        )
    return info


def _are_valid_sizes(value: Any) -> bool:
    # bool is an int in Python: [true] is no shape
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


def _check_byte_layout(infos: Sequence[TensorInfo], begin: int, size: int, file: Path) -> None:
    """Check that every byte after the header belongs to exactly one tensor."""
    for info in infos:
        if info.stop > size:
            raise _truncated_file_error(
                file, f"tensor {info.name} ends at byte {info.stop:,}, the file at {size:,}"
            )
    end, previous = begin, "the header"
    for info in infos:
        if info.start < end:
            raise _corrupt_file_error(file, f"tensor {info.name} overlaps {previous}")
        if info.start > end:
            raise _corrupt_file_error(
                file, f"{info.start - end:,} bytes before tensor {info.name} belong to no tensor"
            )
        end, previous = info.stop, f"tensor {info.name}"
    if end < size:
        raise _corrupt_file_error(
            file, f"{size - end:,} bytes after {previous} belong to no tensor"
        )


def _truncated_file_error(file: Path, detail: str) -> UserError:
    return UserError(f"file {file} is truncated: {detail}; copy or download it again")


def _corrupt_file_error(file: Path, detail: str) -> UserError:
    return UserError(f"file {file} is no valid safetensors file: {detail}; write it again")


def build_header(
    specs: Sequence[TensorSpec], metadata: Mapping[str, str], file: Path
) -> tuple[bytes, list[TensorInfo]]:
    """Return the first bytes of a file of ``specs`` and where each tensor goes.

    The bytes equal those of the reference implementation: tensors sorted from wide to narrow types
    and then by name, compact JSON, padded with spaces so that the data starts at a multiple of 8.

    Raises:
        ValueError: a type without a name in the format, or a tensor named ``__metadata__``.
    """
    header: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    ordered: list[tuple[TensorSpec, int]] = []
    offset = 0
    for spec in sorted(specs, key=_layout_sort_key):
        if spec.name == _METADATA:
            raise ValueError(f"{_METADATA} is no name for a tensor")
        header[spec.name] = {
            "dtype": _CODES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.num_bytes],
        }
        ordered.append((spec, offset))
        offset += spec.num_bytes
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    begin = 8 + len(text)
    infos = [
        TensorInfo(s.name, s.dtype, s.shape, file, begin + at, begin + at + s.num_bytes)
        for s, at in ordered
    ]
    return len(text).to_bytes(8, "little") + text, infos


def _layout_sort_key(spec: TensorSpec) -> tuple[int, str]:
    if spec.dtype not in _RANKS:
        raise ValueError(f"tensor {spec.name}: safetensors has no type for {spec.dtype}")
    return -_RANKS[spec.dtype], spec.name
