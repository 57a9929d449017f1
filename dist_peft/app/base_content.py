"""Verify that checkpoints and fused adapters belong to the base that is loaded.

``store.content`` hashes the rows that a rank reads during loading, ``gather_tensor_hashes``
combines
them into one hash per tensor, ``load`` (``app.model_setup``) compares these with the records of the
checkpoints to resume and of the adapters to fuse. Merges and exports make their own comparison
(``export.merged_weights``), since they read the rows anyway.
"""

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dist_peft.adapters.metadata import METADATA_FILE, read_adapter_metadata
from dist_peft.app.codec_versions import (
    describe_codec,
    describe_other_codec,
    refuse_other_codec,
)
from dist_peft.core.config.run import FusionConfig, QuantConfig
from dist_peft.core.errors import UserError
from dist_peft.core.log import ONCE
from dist_peft.core.world import World
from dist_peft.engine import Engine
from dist_peft.model.frozen_linear import FrozenWeight
from dist_peft.model.parameter_readers import is_never_read
from dist_peft.model.quantization_origin import read_quantization_origin
from dist_peft.model.skeleton import Skeleton
from dist_peft.store.base_record import BaseRecord
from dist_peft.store.content import RowHashes, to_signed_int64
from dist_peft.store.fingerprint import is_sampled_fingerprint
from dist_peft.store.index import SafetensorsIndex

__all__ = [
    "RECORD_FILE",
    "BaseRequirement",
    "describe_lineage",
    "format_base_record",
    "gather_tensor_hashes",
    "read_checkpoint_bases",
    "read_fusion_bases",
]

log = logging.getLogger("dist_peft")

RECORD_FILE = "base.json"
"""File in a checkpoint that holds the record of its base."""


@dataclass(frozen=True)
class BaseRequirement:
    """The base that a checkpoint or an adapter was trained on and requires.

    Attributes:
        owner: the checkpoint or adapter in messages, such as ``checkpoint DIR``.
        record: record of its base.
        fix: remedy for the message about another base.
    """

    owner: str
    record: BaseRecord
    fix: str

    def check_sampled_rows(self, index: SafetensorsIndex) -> None:
        """Compare the fingerprint of ``index``; raises UserError if the base is another one."""
        self.record.check_sample(index, self.owner, self.fix)

    def check_tensor_hashes(self, found: Mapping[str, str], where: str) -> None:
        """Compare tensor hashes; raises UserError if tensors of base ``where`` differ."""
        self.record.check_tensors(found, where, self.owner, self.fix)


# -- hashes ------------------------------------------------------------------------------------


def gather_tensor_hashes(
    hashes: RowHashes, skeleton: Skeleton, engine: Engine, world: World
) -> dict[str, str]:
    """Return the hash of every tensor of the base that the model uses, the same on every rank.

    A tensor that one rank has read completely keeps that rank's hash; for the others, the sums of
    the ranks that shard one copy are added. Copies (replicated groups, tensors that all ranks
    read) are compared.

    Args:
        hashes: hashes of the rows that this rank has read; call on every rank.

    Raises:
        UserError: on every rank: ranks have read different bytes.
    """
    names = hashes.tensor_names
    own = {name: hashes.sums[name] for name in names if name in hashes.sums}
    whole = {name for name, known in own.items() if known.is_complete}
    parts = torch.zeros(len(names), 2, dtype=torch.int64)
    for number, name in enumerate(names):
        if name in own and name not in whole:
            known = own[name]
            parts[number] = torch.tensor([to_signed_int64(known.total), known.num_hashed_rows])
    summed = engine.sum_over_shards(parts.to(engine.device)).tolist()
    anywhere = world.max_over_ranks(*(float(name in whole) for name in names))
    values: list[int | None] = []
    for name, (total, rows), someone in zip(names, summed, anywhere, strict=True):
        if name in whole:
            values.append(own[name].total)
        elif not someone and rows == hashes.count_rows(name):
            values.append(total % 2**64)
        else:
            values.append(None)
    agreed = _exchange_hash_values(names, values, skeleton.index.path, world)
    found = {name: hashes.describe_tensor(name, value) for name, value in agreed.items()}
    missing = _list_used_tensors(skeleton) - found.keys()
    assert not missing, f"never hashed: {sorted(missing)[:5]}"
    return found


def _exchange_hash_values(
    names: list[str], values: list[int | None], path: Path, world: World
) -> dict[str, int]:
    """Return each tensor's value, from the ranks that have one; raises UserError on conflicts."""
    # World.max compares floats, which are exact for the 32-bit halves of a 64-bit value
    halves = [
        half
        for value in values
        for half in ((None, None) if value is None else (value >> 32, value & 0xFFFFFFFF))
    ]
    most = world.max_over_ranks(*(float("-inf") if half is None else half for half in halves))
    least = world.max_over_ranks(*(float("-inf") if half is None else -half for half in halves))
    agreed = {}
    for number, name in enumerate(names):
        high, low = most[2 * number : 2 * number + 2]
        if high == float("-inf"):
            continue
        if (high, low) != (-least[2 * number], -least[2 * number + 1]):
            raise UserError(
                f"ranks have read different bytes of tensor {name} in {path}: hosts have different "
                "copies of base.path; copy it again, or give one on storage that all hosts share"
            )
        agreed[name] = (int(high) << 32) + int(low)
    return agreed


def _list_used_tensors(skeleton: Skeleton) -> set[str]:
    """Return the names of the checkpoint tensors that are loaded, without empty tensors."""
    names: set[str] = set()
    for module in skeleton.model.modules():
        stored = _map_checkpoint_names(module).items()
        names |= {
            source
            for name, source in stored
            if name in module._buffers or not is_never_read(module, name)
        }
        if isinstance(module, FrozenWeight):
            names |= {piece.name for piece in module.pieces}
    return {name for name in names if skeleton.tensors[name].num_bytes}


def _map_checkpoint_names(module: nn.Module) -> dict[str, str]:
    found: dict[str, str] = getattr(module, "checkpoint_names", {})
    return found


# -- records -----------------------------------------------------------------------------------


def format_base_record(record: BaseRecord, quant: QuantConfig | None) -> str:
    """Return the JSON text of ``RECORD_FILE`` for a base that is quantized by ``quant``."""
    return json.dumps({**record.to_metadata(), **describe_codec(quant)}, indent=1)


def read_checkpoint_bases(
    paths: Iterable[Path], index: SafetensorsIndex, quant: QuantConfig | None
) -> list[BaseRequirement]:
    """Return the bases of checkpoints, after comparing their fingerprints with ``index``.

    Args:
        quant: how the base is quantized now; the version of the codec is compared.

    Raises:
        UserError: one was trained on another base, or its record is damaged.
    """
    found = []
    for path in paths:
        file = path / RECORD_FILE
        about = _read_record_file(file) if file.is_file() else {}
        refuse_other_codec(about, quant, f"checkpoint {path}", str(file))
        if not about:
            continue  # written by an earlier version: only ``RunPosition.base`` is compared
        record = BaseRecord.from_metadata(about, file)
        fix = "restore the base, or start over with resume: never"
        found.append(BaseRequirement(f"checkpoint {path}", record, fix))
        found[-1].check_sampled_rows(index)
    return found


def _read_record_file(file: Path) -> dict[str, Any]:
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} is damaged: {error}; resume another checkpoint") from None
    if not isinstance(about, dict):
        raise UserError(f"{file} is damaged: it holds no JSON object; resume another checkpoint")
    return about


def read_fusion_bases(
    fusion: FusionConfig, base: str, skeleton: Skeleton, quant: QuantConfig | None
) -> list[BaseRequirement]:
    """Return the bases of a fusion's adapters that have to equal ``skeleton``'s row by row.

    A base and its quantization by ``dist-peft quantize`` count as one base, as do two
    quantizations of one base (``lineage``): they share no rows, so their origins are compared.

    Raises:
        UserError: an adapter was trained on another base.
    """
    index, found = skeleton.index, []
    for adapter in fusion.adapters:
        directory = Path(adapter.path)
        about = read_adapter_metadata(directory)
        record = BaseRecord.from_metadata(about, directory / "dist_peft.json")
        owner = f"adapter.adapters: {adapter.path}"
        fix = "an adapter means nothing on another base; fuse adapters of one base"
        trained_on = BaseRequirement(owner, record, fix)
        _warn_of_other_codec(about, quant, owner, str(directory / METADATA_FILE))
        if not record.fingerprint or index.matches_fingerprint(record.fingerprint):
            trained_on.check_sampled_rows(index)
            found.append(trained_on)
            continue
        mine, its = _find_base_origin(skeleton), _find_adapter_origin(record, about)
        if mine is not None and mine == its:
            continue
        if (
            mine is not None
            and its is not None
            and is_sampled_fingerprint(mine) == is_sampled_fingerprint(its)
        ):
            trained_on.check_sampled_rows(index)  # raises and describes the difference
        log.warning(
            "%s was trained on %s, whose files are not those of base.path %s; an adapter means "
            "nothing on another base, and the files do not say whether these are forms of one",
            owner,
            record.path,
            base,
            extra=ONCE,
        )
    return found


def _warn_of_other_codec(
    about: Mapping[str, Any], quant: QuantConfig | None, owner: str, where: str
) -> None:
    """Log that an adapter of the same kind was trained with other numbers: a fusion, which
    takes adapters of any quantization of the base, learns on those that it has."""
    trained, kind = about.get("quant"), None if quant is None else quant.kind
    if kind is None or not isinstance(trained, dict) or trained.get("kind") != kind:
        return
    if why := describe_other_codec(about, kind, where):
        log.warning("%s %s", owner, why, extra=ONCE)


def _find_base_origin(skeleton: Skeleton) -> str | None:
    """Return the fingerprint of the unquantized base; None if another tool has quantized it."""
    if skeleton.prequantized is None:
        return skeleton.index.compute_fingerprint()
    return describe_lineage(skeleton).get("base_made_from")


def _find_adapter_origin(record: BaseRecord, about: Mapping[str, Any]) -> str | None:
    if "base_quantized" not in about:
        return record.fingerprint
    origin = about.get("base_made_from")
    return origin if isinstance(origin, str) else None


def describe_lineage(skeleton: Skeleton) -> dict[str, str]:
    """Return the origin of a quantized base for an adapter's ``dist_peft.json``.

    Its quantization and, of a base that ``dist-peft quantize`` wrote, the fingerprint of the
    unquantized base; empty for an unquantized base.
    """
    if (packed := skeleton.prequantized) is None:
        return {}
    origin = read_quantization_origin(skeleton.index.path).get("fingerprint")
    known = {"base_made_from": origin} if isinstance(origin, str) else {}
    return {"base_quantized": packed.format_label, **known}
