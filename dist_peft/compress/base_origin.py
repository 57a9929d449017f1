"""Origin of a base that was quantized in advance, and its comparison with the inputs of a run.

``made_from`` in the ``config.json`` of a packed base::

    base, fingerprint   name and sampled fingerprint of the unquantized base
    content, files      hash of all its tensors; name, size and time of each of its files
    calibration         with solver gptq: samples, tokens, digest of the data section, seed, type

A run whose base was solved before does not read the unquantized one again, unless its files have
other sizes or times.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from dist_peft.core.config.run import RunConfig
from dist_peft.core.errors import UserError
from dist_peft.core.span import Span
from dist_peft.core.world import World
from dist_peft.model.hub import public_base_name
from dist_peft.model.quantization_origin import read_quantization_origin
from dist_peft.store.base_record import BaseRecord
from dist_peft.store.content import RowHashes, is_comparable_hash, to_signed_int64
from dist_peft.store.index import SafetensorsIndex
from dist_peft.store.reader import RowReader

__all__ = [
    "check_origin_contents",
    "check_origin_settings",
    "describe_origin",
    "gather_base_content",
    "hash_unread_tensors",
]

log = logging.getLogger("dist_peft")

_CHUNK_BYTES = 16 * 2**20


def describe_origin(config: RunConfig, fingerprint: str) -> dict[str, Any]:
    """Return everything that the packed rows depend on; ``base`` is informative only.

    Args:
        config: ``base`` is the unquantized one.
        fingerprint: of its files.
    """
    quant = config.base.quant
    assert quant is not None
    origin: dict[str, Any] = {"base": public_base_name(config.base), "fingerprint": fingerprint}
    if quant.solver == "gptq":
        data = config.data.model_dump(mode="json", include={"train", "seq_len", "loss_on"})
        text = json.dumps(data, sort_keys=True)
        origin["calibration"] = {
            "samples": quant.calibration_samples,
            "tokens": quant.calibration_tokens,
            "data": hashlib.sha256(text.encode()).hexdigest(),
            "seed": config.train.seed,
            "compute_dtype": config.base.compute_dtype,
        }
    return origin


def gather_base_content(
    index: SafetensorsIndex, read: Mapping[str, str], world: World
) -> dict[str, Any]:
    """Return the content hash and the files of the unquantized base; call on every rank.

    Args:
        read: hash of each tensor that loading has read; the others are read here.

    Raises:
        UserError: on every rank: damaged files.
    """
    tensors = {**read, **hash_unread_tensors(index, index.tensors.keys() - read.keys(), world)}
    content = BaseRecord("", tensors=tensors).content_id
    return {"content": content, "files": _list_file_times(index)}


# -- comparison --------------------------------------------------------------------------------


def check_origin_settings(out: Path, config: RunConfig, index: SafetensorsIndex) -> None:
    """Compare the origin of the packed base ``out`` with ``config``, without reading rows.

    Args:
        index: of the unquantized base.

    Raises:
        UserError: ``out`` was made from another base or with other calibration settings.
    """
    found = read_quantization_origin(out)
    if not index.matches_fingerprint(str(found.get("fingerprint"))):
        raise _make_origin_error(out, f"base.path: {index.path} has changed, or is another base")
    wanted = describe_origin(config, index.compute_fingerprint())
    mine, its = wanted.get("calibration", {}), found.get("calibration", {})
    if keys := [key for key in mine if its.get(key) != mine[key]]:
        raise _make_origin_error(out, f"calibration ({', '.join(keys)} differ)")


def check_origin_contents(out: Path, index: SafetensorsIndex, world: World) -> None:
    """Compare all rows of the unquantized base, which a run on ``out`` does not read.

    Files with the recorded sizes and times are taken as unchanged.

    Args:
        index: of the unquantized base.

    Raises:
        UserError: on every rank: ``out`` was quantized from other values.
    """
    found = read_quantization_origin(out)
    known = found.get("content")
    with world.raise_together("look at the files of the unquantized base"):
        same_files = found.get("files") == _list_file_times(index)
    if known is None or not world.any_rank(not same_files):
        return
    if not is_comparable_hash(str(known)):
        log.warning(
            "%s was made by another version, with hashes of another kind: %s, whose files are "
            "new, is compared by a sample of its bytes only",
            out,
            index.path,
        )
        return
    log.info("hashing %s, from which the solved base was made: its files are new", index.path)
    content = BaseRecord("", tensors=hash_unread_tensors(index, index.tensors, world)).content_id
    if content != known:
        raise _make_origin_error(out, f"base.path: tensors of {index.path} hold other values")


def _make_origin_error(out: Path, other: str) -> UserError:
    return UserError(
        f"{out} was made from another {other}; remove {out.name}/ to quantize again, or choose "
        "another save.dir"
    )


def _list_file_times(index: SafetensorsIndex) -> list[list[str | int]]:
    """Return name, size and modification time (ns) of each file."""
    stats = [(file.name, file.stat()) for file in index.files]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


def hash_unread_tensors(
    index: SafetensorsIndex, names: Iterable[str], world: World
) -> dict[str, str]:
    """Read and hash tensors that loading did not read; each rank reads its share.

    Raises:
        UserError: on every rank: damaged files.
    """
    infos = [index.find_tensor(name) for name in sorted(names)]
    hashes = RowHashes(infos)
    with world.raise_together("hash the base"), RowReader(index, hashes) as reader:
        chunks = [
            (info.name, span)
            for info in infos
            for span in Span(0, info.num_rows).split_into_chunks(
                max(1, _CHUNK_BYTES // max(1, info.row_bytes))
            )
        ]
        for name, span in chunks[world.rank :: world.size]:
            reader.read_rows(name, span)
    totals = torch.zeros(len(infos), dtype=torch.int64)
    for number, info in enumerate(infos):
        if info.name in hashes.sums:
            totals[number] = to_signed_int64(hashes.sums[info.name].total)
    world.all_reduce_sum(totals)
    described = zip(infos, totals.tolist(), strict=True)
    return {
        info.name: hashes.describe_tensor(info.name, total % 2**64) for info, total in described
    }
