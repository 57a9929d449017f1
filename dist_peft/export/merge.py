"""Merging by streaming: base rows + adapter rows -> a plain Hugging Face directory.

Every tensor of the base is walked in row chunks. A chunk of an adapted weight is read, turned to
float32, merged, cast and written at its place in the output; nothing else is in memory. Two bases
can be merged into:

* ``original``: the rows as the base's files have them. What people serve; differs from the trained
  function by the quantization error of the base.
* ``decoded``: the rows as training saw them, ``decode(encode(rows))``. Reproduces the trained
  function up to the rounding of the output type.

Peak memory is one chunk in float32 with its codes and product (about three times ``chunk_bytes``)
whatever the size of the model.
"""

import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from dist_peft.adapters.merge import Merger
from dist_peft.adapters.peft_format import read_metadata
from dist_peft.core.config import BaseConfig
from dist_peft.core.errors import UserError
from dist_peft.core.span import Span
from dist_peft.model.frozen_linear import FrozenLinear
from dist_peft.model.skeleton import Skeleton, build_skeleton
from dist_peft.store.index import TensorInfo
from dist_peft.store.reader import RowReader
from dist_peft.store.writer import StreamWriter, TensorSpec, atomic_write

__all__ = ["MergeReport", "check_new", "merge_model"]

log = logging.getLogger("dist_peft")

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
"""What ``transformers`` saves of a fast tokenizer; training takes no other."""

_WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pth")


@dataclass(frozen=True)
class MergeReport:
    """What a merge did: tensors written, adapted among them, bytes written."""

    tensors: int
    merged: int
    bytes_written: int


@dataclass
class _Source:
    """How a checkpoint tensor is known in the model."""

    weight: str
    linear: FrozenLinear | None


def merge_model(
    base: BaseConfig,
    directory: Path,
    adapter_dir: Path,
    out: Path,
    *,
    into: Literal["original", "decoded"] = "original",
    dtype: torch.dtype = torch.bfloat16,
    chunk_bytes: int = 64 * 2**20,
    max_file_bytes: int = 5 * 10**9,
) -> MergeReport:
    """Write ``directory`` + adapter as a Hugging Face directory ``out`` in ``dtype``.

    Raises:
        UserError: the adapter does not fit the base, ``out`` is not empty, the disk is full.
    """
    check_new(out)
    skeleton = build_skeleton(base, directory)
    merger = Merger.open(adapter_dir, tied=skeleton.tied)
    trained_on = read_metadata(adapter_dir).get("base_fingerprint")
    if trained_on not in (None, skeleton.index.fingerprint()):
        raise UserError(
            f"adapter {adapter_dir} was trained on another base than {directory}: the weights "
            "differ; set base.path in the run's config.yaml to the one it was trained on"
        )
    sources = _sources(skeleton)
    tensors = skeleton.index.tensors
    specs = [
        TensorSpec(name, dtype if info.dtype.is_floating_point else info.dtype, info.shape)
        for name, info in tensors.items()
    ]
    merged: set[str] = set()
    with RowReader(skeleton.index) as reader, StreamWriter(out, specs, max_file_bytes) as writer:
        for spec in specs:
            source = sources.get(spec.name, _Source(spec.name, None))
            for span in _chunks(tensors[spec.name], chunk_bytes):
                rows = reader.read(spec.name, span)
                rows = _merged_rows(rows, span, source, merger, into)
                writer.write(spec.name, rows.to(spec.dtype), 0 if span is None else span.start)
            if merger.touches(source.weight):
                merged.add(source.weight)
        if left := merger.unused():
            raise UserError(
                f"adapter {adapter_dir} adapts {left[0]}, which {directory} does not have: it "
                "belongs to another base"
            )
    _copy_rest(directory, out, dtype)
    _copy_tokenizer(adapter_dir, out)
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    return MergeReport(len(specs), len(merged), size)


def _sources(skeleton: Skeleton) -> dict[str, _Source]:
    """Checkpoint tensor -> its weight's name in the model and its linear, where it is one."""
    sources = {}
    for path, module in skeleton.model.named_modules():
        for own, name in module.checkpoint_names.items():
            linear = module if isinstance(module, FrozenLinear) and own == "packed" else None
            sources[name] = _Source(f"{path}.{'weight' if linear else own}", linear)
    return sources


def _chunks(info: TensorInfo, chunk_bytes: int) -> Iterator[Span | None]:
    """Row spans of at most ``chunk_bytes`` in float32; ``None`` for a tensor without rows."""
    if not info.shape:
        yield None
        return
    row = 4 * max(1, torch.Size(info.shape[1:]).numel())
    yield from Span(0, info.shape[0]).chunks(max(1, chunk_bytes // row))


def _merged_rows(
    rows: Tensor,
    span: Span | None,
    source: _Source,
    merger: Merger,
    into: Literal["original", "decoded"],
) -> Tensor:
    adapted = merger.touches(source.weight)
    decoded = into == "decoded" and source.linear is not None
    if span is None or not (adapted or decoded):
        return rows
    rows = rows.float()
    if decoded:
        assert source.linear is not None
        if adapted:
            rows = merger.residual_rows(source.weight, rows, span)
        codec = source.linear.codec
        rows = codec.decode(codec.encode(rows), source.linear.in_features, torch.float32)
    return merger.merge_rows(source.weight, rows, span, into) if adapted else rows


def check_new(out: Path) -> None:
    """See that ``out`` is free for what will be written.

    Raises:
        UserError: it is a file, or a directory that holds something.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; give a new directory")
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty; give a new directory")


def _copy_tokenizer(adapter_dir: Path, out: Path) -> None:
    """A tokenizer beside the adapter, which formats conversations as training did, is the one."""
    for path in sorted(adapter_dir.iterdir()):
        if path.name in _TOKENIZER_FILES:
            shutil.copyfile(path, out / path.name)


def _copy_rest(directory: Path, out: Path, dtype: torch.dtype) -> None:
    """Configuration, tokenizer, licence: all files of the base that hold no weights."""
    for path in sorted(directory.iterdir()):
        if path.is_file() and not any(path.match(pattern) for pattern in _WEIGHT_FILES):
            shutil.copyfile(path, out / path.name)
    config = json.loads((directory / "config.json").read_text())
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    atomic_write(out / "config.json", json.dumps(config, indent=2))
