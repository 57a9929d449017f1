"""From a walk to a directory of safetensors files that some library loads: what formats share.

A format says, weight by weight, which tensors it makes of a linear (``plan``), and turns row chunks
into rows of these tensors (``pack``). Everything else (embeddings, norms, biases, the head, and
linears that the format cannot take) is written in one float type.
"""

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from dist_peft.core.errors import UserError
from dist_peft.core.span import Span
from dist_peft.export.merged_weights import Walk, Weight
from dist_peft.export.model_files import check_link, model_files, without_code
from dist_peft.model.frozen_linear import FrozenLinear
from dist_peft.store.fileio import writing
from dist_peft.store.writer import StreamWriter, TensorSpec, atomic_write

__all__ = [
    "MAX_FILE_BYTES",
    "Packer",
    "Piece",
    "Written",
    "check_new",
    "copy_configuration",
    "copy_tokenizer",
    "unpacked_linears",
    "write_directory",
]

MAX_FILE_BYTES = 5 * 10**9

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
"""What ``transformers`` saves of a fast tokenizer; training takes no other."""


class Piece(NamedTuple):
    """Rows for one tensor of the output, from row ``start`` on."""

    name: str
    rows: Tensor
    start: int


class Packer(Protocol):
    """One format's way to store the weight of a linear."""

    row_multiple: int
    """Chunks of a weight have a multiple of this many rows, but for the last."""

    def takes(self, weight: Weight) -> bool:
        """Whether this linear of a block can be packed."""

    def plan(self, weight: Weight) -> list[TensorSpec]:
        """The tensors that replace it."""

    def pack(self, walk: Walk, weight: Weight, span: Span) -> Iterable[Piece]:
        """Rows ``span`` of it; called for all spans of a weight in order."""

    def settings(self, walk: Walk, unpacked: list[str]) -> Mapping[str, Any]:
        """Keys of ``config.json``, given the paths of the linears that stay unpacked."""


@dataclass(frozen=True)
class Written:
    """What an export wrote.

    Attributes:
        tensors, packed: tensors of the output, and weights of the base that were packed.
        merged: weights that the adapter changed.
        bytes_written: of the files with weights.
        unpacked: linears of blocks that the format could not take.
    """

    tensors: int
    packed: int
    merged: int
    bytes_written: int
    unpacked: tuple[str, ...] = ()


def write_directory(
    walk: Walk,
    packer: Packer | None,
    out: Path,
    dtype: torch.dtype,
    max_file_bytes: int = MAX_FILE_BYTES,
    compute: torch.dtype | None = None,
) -> Written:
    """Stream every weight of ``walk`` into safetensors files in ``out``.

    Args:
        walk: what to write.
        packer: the format; None writes every weight in ``dtype``.
        out: made if missing.
        dtype: of floating-point tensors that are not packed.
        max_file_bytes: most bytes of a file.
        compute: the run's compute type, if ``dtype`` is wider: what training rounded to first.
    """
    packed = {w.name for w in walk.weights if packer and walk.packs(w) and packer.takes(w)}
    plans: dict[str, list[TensorSpec]] = {}
    for weight in walk.weights:
        info = weight.info
        if packer is not None and weight.name in packed:
            plans[weight.name] = packer.plan(weight)
        else:
            kind = (weight.wide or dtype) if info.dtype.is_floating_point else info.dtype
            plans[weight.name] = [TensorSpec(weight.written, kind, info.shape)]
    specs = [spec for plan in plans.values() for spec in plan]
    merged = 0
    with StreamWriter(out, specs, max_file_bytes) as writer:
        for weight in walk.weights:
            if packer is not None and weight.name in packed:
                for span in walk.spans(weight, packer.row_multiple):
                    for piece in packer.pack(walk, weight, span):
                        writer.write(*piece)
            else:
                kind = plans[weight.name][0].dtype
                for span in walk.spans(weight):
                    rows = walk.rows(weight, span)
                    if compute is not None and rows.is_floating_point() and not weight.wide:
                        rows = rows.to(compute)
                    writer.write(weight.written, rows.to(kind), span.start)
            merged += walk.adapts(weight) and walk.state != "base"
        walk.check_complete()
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    left = tuple(w.stem for w in walk.weights if packer and w.in_block and w.name not in packed)
    return Written(len(specs), len(packed), merged, size, left)


def unpacked_linears(walk: Walk, left: Iterable[str]) -> list[str]:
    """Paths of linears that a loader must not convert: outside of blocks, and ``left``."""
    inside = {w.module for w in walk.weights if w.in_block}
    outside = [
        path
        for path, module in walk.skeleton.model.named_modules()
        if isinstance(module, nn.Linear | FrozenLinear) and path not in inside
    ]
    return [*outside, *left]


def check_new(out: Path) -> None:
    """See that ``out`` is free for what will be written.

    Raises:
        UserError: it is a file, or a directory that holds something.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; give a new directory")
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty; give a new directory")


def copy_tokenizer(adapter_dir: Path, out: Path) -> None:
    """A tokenizer beside the adapter, which formats conversations as training did, is the one."""
    for path in sorted(adapter_dir.iterdir()):
        if path.name in _TOKENIZER_FILES:
            check_link(path, adapter_dir)
            _copy(path, out / path.name)


def copy_configuration(
    directory: Path,
    out: Path,
    dtype: torch.dtype,
    changes: Mapping[str, Any],
    *,
    code: bool = False,
) -> None:
    """Configuration, tokenizer, licence: what ``model_files`` lists, and nothing else.

    Args:
        directory: the base.
        out: exists.
        dtype: the type that loaders shall use.
        changes: further keys of ``config.json``.
        code: the caller trusts the base's own code, which is then copied as far as ``auto_map``
            needs it; else ``auto_map`` is left out.

    Raises:
        UserError: a file is a link out of the directory, the disk is full, or no permission.
    """
    for name in model_files(directory, code=code):
        if name == "config.json":
            continue  # last, and in one piece: a directory without it is never taken for a model
        path = directory / name
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        content = None if code else without_code(path)
        if content is None:
            _copy(path, out / name)
        else:
            atomic_write(out / name, json.dumps(content, indent=2, ensure_ascii=False))
    config = json.loads((directory / "config.json").read_text())
    for key in ("torch_dtype", "quantization_config"):  # of the base, not of what is written
        config.pop(key, None)
    if not code:
        config.pop("auto_map", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    atomic_write(out / "config.json", json.dumps({**config, **changes}, indent=2))


def _copy(source: Path, target: Path) -> None:
    with writing(target, source.stat().st_size):
        shutil.copyfile(source, target)
