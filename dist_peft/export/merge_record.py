"""``merge_record.json``: which adapter a merged directory holds, and how it was put in.

Written with the directory and read by ``dist-peft switch``, which takes that adapter out again. No
loader reads it.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dist_peft.adapters.full.format import contains_trained_weights
from dist_peft.adapters.metadata import read_adapter_metadata
from dist_peft.core.errors import UserError
from dist_peft.model.hub import read_json_object
from dist_peft.store.writer import write_atomically

__all__ = ["RECORD_NAME", "MergeRecord", "hash_adapter", "select_base_entries"]

RECORD_NAME = "merge_record.json"

_VERSION = 1
_OF_BASE = ("base", "base_fingerprint", "base_content", "quant", "codec_version")


@dataclass(frozen=True)
class MergeRecord:
    """How a merged directory was made.

    Attributes:
        format: name of the export format.
        state: of the weights (``export.merged_weights``): original, decoded or codes.
        dtype: type of tensors that are not packed, such as ``bfloat16``.
        adapter: ``hash_adapter`` of the adapter in it; None: it holds none.
        keeps_zeros: weights that are zero in the base stayed zero.
        stop_tokens: token ids that the adapter's run added to ``generation_config.json``.
        base: the entries of ``dist_peft.json`` of that run's adapter that describe its base and
            quantization (``select_base_entries``).
    """

    format: str
    state: str
    dtype: str
    adapter: str | None
    keeps_zeros: bool = False
    stop_tokens: tuple[int, ...] = ()
    base: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of_adapter(
        cls,
        adapter_dir: Path,
        *,
        format: str,
        state: str,
        dtype: str,
        keeps_zeros: bool = False,
        stop_tokens: Sequence[int] = (),
    ) -> "MergeRecord":
        """Return the record of a merge of the adapter in ``adapter_dir``."""
        adapter, base = hash_adapter(adapter_dir), select_base_entries(adapter_dir)
        return cls(format, state, dtype, adapter, keeps_zeros, tuple(stop_tokens), base)

    def write_to_directory(self, directory: Path) -> None:
        """Write ``merge_record.json``; raises UserError if the disk is full."""
        text = json.dumps({"version": _VERSION, **asdict(self)}, indent=2) + "\n"
        write_atomically(directory / RECORD_NAME, text)

    @classmethod
    def read_from_directory(cls, directory: Path) -> "MergeRecord":
        """Read the record of a merged directory.

        Raises:
            UserError: there is none, or it is damaged or of another version.
        """
        file = directory / RECORD_NAME
        if not file.is_file():
            raise UserError(
                f"{directory} has no {RECORD_NAME}: it was not written by merge or export of this "
                "version, so the adapter in it is not known; merge the run again"
            )
        found = read_json_object(file)
        version = found.pop("version", None)
        if version != _VERSION:
            raise UserError(f"{file} has version {version!r}; this program reads {_VERSION}")
        try:
            record = cls(**{**found, "stop_tokens": tuple(found.get("stop_tokens", ()))})
        except TypeError as error:
            raise UserError(f"{file} is damaged: {error}; merge the run again") from None
        texts = (record.format, record.state, record.dtype, record.adapter or "")
        ids = all(isinstance(token, int) for token in record.stop_tokens)
        well = ids and isinstance(record.base, dict)
        if not well or not all(isinstance(text, str) for text in texts):
            raise UserError(f"{file} is damaged: a value has another type; merge the run again")
        return record


def select_base_entries(adapter_dir: Path) -> dict[str, Any]:
    """Return the entries of an adapter's ``dist_peft.json`` that describe its base."""
    about = read_adapter_metadata(adapter_dir)
    return {key: about[key] for key in _OF_BASE if key in about}


def hash_adapter(adapter_dir: Path) -> str:
    """Return the SHA-256 of an adapter's tensors; empty for trained weights of the base, which are
    too many to be read twice."""
    if contains_trained_weights(adapter_dir):
        return ""
    digest = hashlib.sha256()
    for file in sorted(adapter_dir.glob("*.safetensors")):
        digest.update(file.name.encode())
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()
