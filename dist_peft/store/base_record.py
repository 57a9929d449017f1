"""The record of a base that an adapter or checkpoint keeps, and the comparison of two bases.

An adapter and every checkpoint have a record::

    {"fingerprint": "v2:...",            a sample of the files; known before they are read
     "config": {"rope_theta": 10000, ...},       ``config.json``, keys that affect the function
     "tensors": {"model.norm.weight": "2:9c1f...", ...}} a hash of all rows of each tensor in use

Checks run as early as their data are known: ``check_sample`` before a base is loaded,
``check_tensors`` after all its rows were read. Messages name the keys and tensors that differ.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dist_peft.core.errors import UserError
from dist_peft.core.log import ONCE
from dist_peft.store.content import is_comparable_hash, tag_hash
from dist_peft.store.fingerprint import is_sampled_fingerprint, read_config_meaning
from dist_peft.store.index import SafetensorsIndex

__all__ = ["BaseRecord"]

log = logging.getLogger("dist_peft")

_SHOWN = 3


@dataclass(frozen=True)
class BaseRecord:
    """Identity of a base: sampled fingerprint, configuration and tensor hashes.

    Attributes:
        path: the base as the user named it, for messages.
        fingerprint: of ``SafetensorsIndex``, perhaps of an earlier version; empty: not known.
        config: as returned by ``fingerprint.select_config_meaning``; None: not known.
        tensors: name -> hash (``RowHashes.describe_tensor``); empty: not known.
    """

    path: str
    fingerprint: str = ""
    config: Mapping[str, Any] | None = None
    tensors: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def from_index(cls, path: str, index: SafetensorsIndex) -> "BaseRecord":
        """Build the record of a base from its headers and samples, before its rows are read.

        Raises:
            UserError: damaged files.
        """
        return cls(path, index.compute_fingerprint(), read_config_meaning(index.path))

    # -- as JSON ---------------------------------------------------------------------------------

    def to_metadata(self) -> dict[str, Any]:
        """Return the keys for an adapter's ``dist_peft.json``."""
        content = {"config": self.config, "tensors": dict(sorted(self.tensors.items()))}
        return {
            "base": self.path,
            "base_fingerprint": self.fingerprint,
            "base_content": {"id": self.content_id, **content},
        }

    @classmethod
    def from_metadata(cls, about: Mapping[str, Any], where: Path) -> "BaseRecord":
        """Rebuild a record from the keys that ``to_metadata`` or another version wrote.

        Hashes of another kind than this version computes are left out, as if there were none.

        Args:
            where: the file, for messages.

        Raises:
            UserError: the keys exist with invalid values.
        """
        fingerprint = about.get("base_fingerprint") or ""
        content = about.get("base_content") or {}
        known: dict[str, Any] = content if isinstance(content, dict) else {"tensors": None}
        config, tensors = known.get("config"), known.get("tensors", {})
        well = isinstance(fingerprint, str) and isinstance(config, dict | None)
        well = well and isinstance(tensors, dict)
        well = well and all(isinstance(value, str) for value in tensors.values())
        if not well or len({is_comparable_hash(value) for value in tensors.values()}) > 1:
            raise UserError(
                f"{where} is damaged: base_fingerprint or base_content is not as this project "
                "writes; get it again"
            )
        kept = {name: value for name, value in tensors.items() if is_comparable_hash(value)}
        return cls(str(about.get("base", "")), fingerprint, config, kept)

    # -- comparing -------------------------------------------------------------------------------

    @property
    def content_id(self) -> str:
        """One hexadecimal SHA-256 for ``tensors``, tagged as they are."""
        text = json.dumps(sorted(self.tensors.items()))
        return tag_hash(hashlib.sha256(text.encode()).hexdigest())

    @property
    def is_complete(self) -> bool:
        """Whether all rows can be compared; else it is of another version."""
        return bool(self.tensors)

    def check_sample(self, index: SafetensorsIndex, subject: str, fix: str) -> None:
        """Check by its samples that the base of ``index`` may be the recorded one, without reading
        it. Log a warning if the record has no hashes, so that this is the only check.

        Args:
            subject: trained on the recorded base, such as ``adapter DIR``.
            fix: remedy for the message.

        Raises:
            UserError: it is another base.
        """
        if not self.fingerprint or index.matches_fingerprint(self.fingerprint):
            if self.fingerprint and not self.is_complete:
                log.info(
                    "%s is of another version, which kept no hashes of the base's rows or of "
                    "another kind: %s is compared by a sample of its bytes only",
                    subject,
                    index.path,
                    extra=ONCE,
                )
            return
        found = read_config_meaning(index.path)
        why = "" if self.config is None else _describe_config_differences(self.config, found)
        why = why or "a sample of its tensors holds other names, types, shapes or values"
        raise self._other_base_error(subject, str(index.path), why, fix)

    def check_tensors(self, found: Mapping[str, str], where: str, subject: str, fix: str) -> None:
        """Check that the base has the recorded tensors.

        Args:
            found: hashes of the base at ``where``; of more tensors than are recorded, perhaps.
            subject, fix: as in ``check_sample``.

        Raises:
            UserError: a tensor is missing or has another hash.
        """
        other = sorted(name for name, value in self.tensors.items() if found.get(name) != value)
        if not other:
            return
        more = f" and {len(other) - _SHOWN} more" if len(other) > _SHOWN else ""
        why = (
            f"{len(other)} of {len(self.tensors)} tensors hold other values: "
            f"{', '.join(other[:_SHOWN])}{more}"
        )
        raise self._other_base_error(subject, where, why, fix)

    def describe_difference(self, other: "BaseRecord") -> str | None:
        """Return how two recorded bases differ as text; None if no difference is known."""
        known = self.config is not None and other.config is not None
        if known and (why := _describe_config_differences(self.config or {}, other.config or {})):
            return why
        common = self.tensors.keys() & other.tensors.keys()
        names = sorted(name for name in common if self.tensors[name] != other.tensors[name])
        if names:
            return f"{len(names)} of {len(common)} tensors hold other values, such as {names[0]}"
        if self.tensors and other.tensors:
            return None if common else "they have no tensor of one name"
        if self.is_comparable(other) and self.fingerprint != other.fingerprint:
            return "their fingerprints differ"
        return None

    def is_comparable(self, other: "BaseRecord") -> bool:
        """Return whether both have a fingerprint of the same version."""
        mine, its = self.fingerprint, other.fingerprint
        return bool(mine and its) and is_sampled_fingerprint(mine) == is_sampled_fingerprint(its)

    def _other_base_error(self, subject: str, where: str, why: str, fix: str) -> UserError:
        named = f"; it was {self.path}" if self.path and self.path != where else ""
        return UserError(f"{subject} was trained on another base than {where}: {why}{named}; {fix}")


def _describe_config_differences(recorded: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """Return which keys of ``config.json`` differ, with both values; empty if none does."""
    mine, its = _flatten_leaves(recorded), _flatten_leaves(found)
    keys = sorted(key for key in mine.keys() | its.keys() if mine.get(key) != its.get(key))
    shown = [
        f"{key} is {_format_leaf(its, key)}, was {_format_leaf(mine, key)}" for key in keys[:_SHOWN]
    ]
    more = f", and {len(keys) - _SHOWN} more keys" if len(keys) > _SHOWN else ""
    return f"in config.json {', '.join(shown)}{more}" if keys else ""


def _flatten_leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            found |= _flatten_leaves(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def _format_leaf(leaves: Mapping[str, Any], key: str) -> str:
    text = json.dumps(leaves[key]) if key in leaves else "missing"
    return text if len(text) <= 60 else f"{text[:57]}..."
