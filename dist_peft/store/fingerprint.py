"""Fingerprints of a base, which distinguish bases before they are read.

``compute_sampled_fingerprint`` hashes samples of *every* tensor and the meaningful keys of
``config.json``.
It refuses most mistakes in the first second of a run; a change between the samples is found by the
hashes of all rows (``store.content``), once the rows are read.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dist_peft.core.errors import UserError
from dist_peft.store.fileio import OpenFiles, read_exactly, translate_read_errors
from dist_peft.store.format import TensorInfo

__all__ = [
    "compute_edges_fingerprint",
    "compute_sampled_fingerprint",
    "is_sampled_fingerprint",
    "read_config_meaning",
    "select_config_meaning",
]

_VERSION = "v2:"
_SAMPLE_BYTES = 96
_SAMPLES = 4
"""Of a tensor, evenly spaced from its first bytes to its last."""
_MOST_READS = 8000
"""A base of thousands of tensors (experts one by one) has fewer samples each, at least one."""
_EDGE_BYTES = 64 * 1024

_NO_MEANING = {
    *("_name_or_path", "name_or_path", "_commit_hash", "transformers_version", "architectures"),
    *("made_from", "torch_dtype", "dtype", "use_cache", "return_dict"),
    *("output_attentions", "output_hidden_states"),
    *("_attn_implementation", "_attn_implementation_autoset", "attn_implementation"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id"),
    *("id2label", "label2id", "num_labels", "problem_type", "finetuning_task"),
    *("task_specific_params", "temperature", "top_k", "top_p", "typical_p", "do_sample"),
    *("num_beams", "max_length", "max_new_tokens", "min_length", "early_stopping"),
    *("repetition_penalty", "length_penalty", "no_repeat_ngram_size"),
}
"""Keys of ``config.json`` without influence on the logits of given tokens: provenance, the type of
the file's tensors (which the tensors say themselves), how texts are generated and where they end,
and labels, which a classifier has of its own."""


def compute_sampled_fingerprint(tensors: Iterable[TensorInfo], config: Mapping[str, Any]) -> str:
    """Return ``v2:`` and a hexadecimal SHA-256 of every tensor's name, type, shape and samples.

    How tensors are distributed over files does not matter.

    Args:
        tensors: of a base, in any order.
        config: ``select_config_meaning`` of its ``config.json``.

    Raises:
        UserError: a file is gone or shorter than when it was opened.
    """
    ordered = sorted(tensors, key=lambda info: info.name)
    samples = max(1, min(_SAMPLES, _MOST_READS // max(1, len(ordered))))
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    files = OpenFiles(os.O_RDONLY)
    try:
        for info in ordered:
            digest.update(json.dumps([info.name, str(info.dtype), info.shape]).encode())
            for offset, length in _list_sample_places(info.stop - info.start, samples):
                digest.update(_read_file_bytes(files, info.file, info.start + offset, length))
    finally:
        files.close()
    return _VERSION + digest.hexdigest()


def _list_sample_places(size: int, samples: int) -> list[tuple[int, int]]:
    """Return (offset, length) of the samples of ``size`` bytes; all bytes if there are no more."""
    if size <= samples * _SAMPLE_BYTES:
        return [(0, size)]
    last = size - _SAMPLE_BYTES
    if samples == 1:
        return [(last // 2, _SAMPLE_BYTES)]
    return [(last * number // (samples - 1), _SAMPLE_BYTES) for number in range(samples)]


def is_sampled_fingerprint(fingerprint: str) -> bool:
    """Return whether ``compute_sampled_fingerprint`` made it; else ``compute_edges_fingerprint``
    did."""
    return fingerprint.startswith(_VERSION)


def compute_edges_fingerprint(files: Sequence[Path], tensors: Iterable[TensorInfo]) -> str:
    """Return the fingerprint of earlier versions, to check adapters and checkpoints of theirs.

    A hexadecimal SHA-256 of names, types, shapes and places, and of the first and last 64 KiB of
    the data of every file.

    Raises:
        UserError: a file is gone or shorter than when it was opened.
    """
    digest = hashlib.sha256()
    contents: dict[Path, list[TensorInfo]] = {file: [] for file in files}
    for info in tensors:
        contents[info.file].append(info)
    opened = OpenFiles(os.O_RDONLY)
    try:
        for file, infos in contents.items():
            begin = min((i.start for i in infos), default=0)
            end = max((i.stop for i in infos), default=0)
            table = [
                (i.name, str(i.dtype), i.shape, i.start - begin, i.stop - begin)
                for i in sorted(infos, key=lambda i: i.name)
            ]
            digest.update(json.dumps(table).encode() + b"\n")
            length = min(end - begin, _EDGE_BYTES)
            for offset in (begin, end - length):
                digest.update(_read_file_bytes(opened, file, offset, length))
    finally:
        opened.close()
    return digest.hexdigest()


def select_config_meaning(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a ``config.json`` that affect the function of the weights.

    Keys of no influence are left out at every depth, and so are keys that are null; numbers that
    are equal become the same (``1e4``, ``10000.0`` and ``10000``).
    """
    meaning = _select_meaning(dict(config))
    assert isinstance(meaning, dict)
    return meaning


def _select_meaning(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if k not in _NO_MEANING and v is not None}
        return {key: _select_meaning(inner) for key, inner in kept.items()}
    if isinstance(value, list):
        return [_select_meaning(inner) for inner in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def read_config_meaning(path: Path) -> dict[str, Any]:
    """Return ``select_config_meaning`` of ``path/config.json``; empty where there is none.

    Raises:
        UserError: it is no JSON object.
    """
    file = path / "config.json"
    if not file.is_file():
        return {}
    with translate_read_errors(file):
        text = file.read_bytes()
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not valid JSON: {error}; copy or download it again") from None
    if not isinstance(config, dict):
        raise UserError(f"{file} does not hold a JSON object; copy or download it again")
    return select_config_meaning(config)


def _read_file_bytes(files: OpenFiles, file: Path, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    with translate_read_errors(file):
        read_exactly(files.get_descriptor(file), memoryview(buffer), offset, file)
    return bytes(buffer)
