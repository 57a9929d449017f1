"""Write merged weights as a directory of safetensors files; shared by all directory formats.

A format declares, weight by weight, the tensors that replace a linear (``plan``), and converts row
chunks into rows of these tensors (``pack``). Everything else (embeddings, norms, biases, the head,
and linears that the format cannot pack) is written in one float type.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from dist_peft.core.host_memory import keep_freed_memory
from dist_peft.core.span import Span
from dist_peft.export.base_weights import BaseWeight
from dist_peft.export.merged_weights import MergedWeights
from dist_peft.export.weight_threads import count_merge_threads, process_weights
from dist_peft.model.classifier import classifier_config_keys
from dist_peft.model.frozen_linear import FrozenLinear
from dist_peft.model.hub import load_tokenizer
from dist_peft.model.model_files import check_link_target, copy_file
from dist_peft.store.publish import check_output_free
from dist_peft.store.writer import MAX_FILE_BYTES, StreamWriter, TensorSpec

__all__ = [
    "TensorPiece",
    "TensorRewriter",
    "WeightPacker",
    "WriteResult",
    "check_output_free",
    "copy_tokenizer_files",
    "describe_written_model",
    "list_unpacked_linears",
    "write_model_directory",
]

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
"""Files that ``transformers`` saves for a fast tokenizer; training supports no other kind."""


class TensorPiece(NamedTuple):
    """Rows of one output tensor, beginning at row ``start``."""

    name: str
    rows: Tensor
    start: int


class WeightPacker(Protocol):
    """Stores the weight of a linear in one format."""

    row_multiple: int
    """All chunks of a weight but the last are a multiple of this many rows long."""

    def can_pack(self, weight: BaseWeight) -> bool:
        """Return whether the format can pack this weight of a block's linear."""

    def plan_tensors(self, weight: BaseWeight) -> list[TensorSpec]:
        """Return names, types and shapes of the tensors that replace the weight."""

    def pack_rows(
        self, walk: MergedWeights, weight: BaseWeight, span: Span
    ) -> Iterable[TensorPiece]:
        """Pack rows ``span`` of the weight; called for all spans of a weight in order. Weights are
        packed by several threads."""

    def make_config(self, walk: MergedWeights, unpacked: list[str]) -> Mapping[str, Any]:
        """Return keys of ``config.json``, given the paths of linears that stay unpacked."""


@runtime_checkable
class TensorRewriter(Protocol):
    """A packer that has another form for tensors that are no linears' weights, too."""

    def rewrites(self, weight: BaseWeight) -> bool:
        """Return whether ``plan_tensors`` and ``pack_rows`` write this tensor."""


@dataclass(frozen=True)
class WriteResult:
    """Statistics of a written export.

    Attributes:
        tensors: number of tensors in the output.
        packed: number of weights of the base that were packed.
        merged: number of weights that the adapter changed.
        bytes_written: total size of the weight files.
        unpacked: linears of blocks that the format could not pack.
    """

    tensors: int
    packed: int
    merged: int
    bytes_written: int
    unpacked: tuple[str, ...] = ()


def write_model_directory(
    walk: MergedWeights,
    packer: WeightPacker | None,
    out: Path,
    dtype: torch.dtype,
    max_file_bytes: int = MAX_FILE_BYTES,
    compute: torch.dtype | None = None,
) -> WriteResult:
    """Stream every weight of ``walk`` into safetensors files in ``out``.

    Args:
        walk: the merged weights to write.
        packer: the format; None writes every weight in ``dtype``.
        out: output directory; created if missing.
        dtype: type of floating-point tensors that are not packed.
        max_file_bytes: maximum size of a file.
        compute: the run's compute type, if ``dtype`` is wider; rows are rounded to it first, as
            in training.

    Returns:
        Counts of tensors, size of the files and names of unpacked linears.
    """
    packed = {w.name for w in walk.weights if packer and walk.is_packable(w) and packer.can_pack(w)}
    linears = len(packed)
    if isinstance(packer, TensorRewriter):
        packed |= {w.name for w in walk.weights if packer.rewrites(w)}
    plans: dict[str, list[TensorSpec]] = {}
    for weight in walk.weights:
        if packer is not None and weight.name in packed:
            plans[weight.name] = packer.plan_tensors(weight)
        else:
            plans[weight.name] = weight.plan_dense_tensors(_choose_dtype(weight, dtype))
    specs = [spec for plan in plans.values() for spec in plan]
    with StreamWriter(out, specs, max_file_bytes) as writer, keep_freed_memory():

        def write_weight(weight: BaseWeight, stop: Callable[[], bool]) -> None:
            if packer is not None and weight.name in packed:
                for span in walk.iterate_spans(weight, packer.row_multiple):
                    for piece in packer.pack_rows(walk, weight, span):
                        writer.write_rows(*piece)
                    if stop():
                        return
                return
            kind, first = _choose_dtype(weight, dtype), weight.first_written_row
            for span in walk.iterate_spans(weight):
                rows = walk.read_merged_rows(weight, span)
                if compute is not None and rows.is_floating_point() and not weight.wide:
                    rows = rows.to(compute)
                rows, start = weight.to_written_rows(rows.to(kind), span.start)
                writer.write_rows(weight.written, rows, first + start)
                if stop():
                    return

        threads = count_merge_threads(walk.chunk_bytes, walk.largest_held_bytes)
        process_weights(walk.weights, write_weight, threads)
        walk.check_all_consumed()
    merged = 0 if walk.state == "base" else sum(map(walk.is_adapted, walk.weights))
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    left = tuple(
        w.module_path
        for w in walk.weights
        if packer and w.is_block_linear and not w.is_expert and w.name not in packed
    )
    return WriteResult(len(specs), linears, merged, size, left)


def _choose_dtype(weight: BaseWeight, dtype: torch.dtype) -> torch.dtype:
    """Return the type of a weight that is not packed, where floating-point ones have ``dtype``."""
    own = weight.info.dtype
    return (weight.wide or dtype) if own.is_floating_point else own


def list_unpacked_linears(walk: MergedWeights, left: Iterable[str]) -> list[str]:
    """Return paths of modules that a loader must not convert: linears outside blocks, ``left``, and
    experts that stay dense."""
    inside = {w.module_path for w in walk.weights if w.is_block_linear}
    outside = [
        path
        for path, module in walk.skeleton.model.named_modules()
        if isinstance(module, nn.Linear | FrozenLinear) and path not in inside
    ]
    experts = dict.fromkeys(w.experts_path for w in walk.weights if w.is_dense)
    return [*outside, *left, *experts]


def describe_written_model(walk: MergedWeights, directory: Path, *, code: bool) -> dict[str, Any]:
    """Return keys of ``config.json`` that the written model has and the base in ``directory`` has
    not; ``code``: the base's own code may run."""
    changes: dict[str, Any] = dict(walk.skeleton.settings)
    if walk.skeleton.head is not None:
        tokenizer = load_tokenizer(directory, code)
        changes |= classifier_config_keys(walk.skeleton.model, tokenizer)
    return changes


def copy_tokenizer_files(adapter_dir: Path, out: Path) -> None:
    """Prefer the tokenizer saved with the adapter: it formats conversations as training did."""
    for path in sorted(adapter_dir.iterdir()):
        if path.name in _TOKENIZER_FILES:
            check_link_target(path, adapter_dir)
            copy_file(path, out / path.name)
