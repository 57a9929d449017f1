"""``gguf``: one file that llama.cpp runs, with tokenizer and metadata.

Linears of the blocks are stored in Q4_1, Q8_0 (``gguf_blocks``) or F16. Experts whose MXFP4 codes
training kept are stored in MXFP4 with any of them.

Q8_0 keeps 8-bit codes that were trained through the quantizer with ``base.quant.solver: absmax``,
whose zeros are 128: ``w = d (q - 128)``, to the last bit.

From an integer base with the adapter in its zeros, Q4_1 keeps codes and scales and rounds only
``m`` to fp16; codes of 2 and 3 bits fit, groups are split into blocks of 32. Embeddings, head and
linears whose ``in`` is not a multiple of 32 are stored in the run's compute type, norms and biases
in float32.

The ``gguf`` package writes header, metadata and tensor table; rows then follow at their offsets.
Those of one weight may belong to two tensors (``gate_proj`` and ``up_proj``): they are read once.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import gguf
import numpy as np
import torch
from torch import Tensor

from dist_peft.core.errors import UserError
from dist_peft.core.host_memory import return_freed_memory
from dist_peft.core.span import Span
from dist_peft.export.base_weights import BaseWeight, split_experts
from dist_peft.export.formats.gguf_blocks import (
    BLOCK,
    pack_mxfp4_blocks,
    pack_q4_1_blocks,
    pack_q8_0_blocks,
    pack_symmetric_codes,
)
from dist_peft.export.formats.gguf_model import GgufModelLayout, RowTarget
from dist_peft.export.formats.gguf_tokenizer import add_tokenizer_metadata
from dist_peft.export.formats.groups import convert_to_bias_groups, quantize_bias_groups
from dist_peft.export.merged_weights import MergedWeights
from dist_peft.export.model_directory import WriteResult
from dist_peft.export.stopping import read_turn_end_ids
from dist_peft.model.experts import ExpertStack
from dist_peft.quant.mxfp4 import Mxfp4Codec
from dist_peft.store.fileio import (
    make_temporary_name,
    sync_directory,
    translate_write_errors,
    write_exactly,
)

__all__ = ["write_gguf_file"]

_IGNORED = np.dtype(np.float32)  # the writer ignores it if a GGML type is passed

_Kind = gguf.GGMLQuantizationType
_FLOATS = {torch.float32: _Kind.F32, torch.float16: _Kind.F16, torch.bfloat16: _Kind.BF16}
_ROUTER = ".ffn_gate_inp."
_VECTORS = (".ffn_gate_inp_shexp.weight", ".exp_probs_b.bias")
_EXPERT_BIAS = "_exps.bias"
"""Tensors that llama.cpp has in float32, those of the second line as vectors."""

_KINDS = {"q4_1": _Kind.Q4_1, "q8_0": _Kind.Q8_0, "f16": _Kind.F16, "mxfp4": _Kind.Q8_0}
"""Type of the linears; experts of ``mxfp4`` are in MXFP4."""

_FILE_TYPES = {
    "q4_1": gguf.LlamaFileType.MOSTLY_Q4_1,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "mxfp4": gguf.LlamaFileType.MOSTLY_MXFP4_MOE,
}


def write_gguf_file(
    walk: MergedWeights, kind: str, file: Path, tokenizer: Path, name: str, dtype: torch.dtype
) -> WriteResult:
    """Write merged weights as a GGUF file, in one pass.

    Args:
        walk: the merged weights to write.
        kind: q4_1, q8_0, f16 or mxfp4, for linears of blocks.
        file: path of the new file.
        tokenizer: directory with the tokenizer's files.
        name: name of the model in the metadata.
        dtype: compute type of the run.

    Returns:
        Counts of tensors, size of the file and names of unpacked linears.

    Raises:
        UserError: an architecture or tokenizer that cannot be written, or the disk is full.
    """
    model = GgufModelLayout(walk.skeleton)
    walk.weights = split_experts(walk.weights)
    plan = _plan_tensors(walk, model, kind, dtype)
    tensors = plan.tensors
    size = sum(tensor.num_bytes for tensor in tensors)
    factors = model.compute_rope_factors()
    made_directory = not file.parent.exists()
    with translate_write_errors(file, size):
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = make_temporary_name(file)
        try:
            writer = gguf.GGUFWriter(temporary, gguf.MODEL_ARCH_NAMES[model.architecture])
            model.add_model_metadata(writer, name, _FILE_TYPES[kind])
            add_tokenizer_metadata(writer, tokenizer, model.config.vocab_size)
            if ends := read_turn_end_ids(walk.adapter_dir):
                writer.add_eot_token_id(ends[0])
            for tensor in tensors:
                writer.add_tensor_info(
                    tensor.name, tensor.shape, _IGNORED, tensor.num_bytes, tensor.kind
                )
            if factors is not None:
                shape, size = tuple(factors.shape), factors.nbytes
                writer.add_tensor_info("rope_freqs.weight", shape, _IGNORED, size, _Kind.F32)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            writer.close()
            with return_freed_memory():
                _append_tensors(walk, model, plan, temporary, factors, dtype)
            walk.check_all_consumed()
            os.replace(temporary, file)
            sync_directory(file.parent)
        finally:
            temporary.unlink(missing_ok=True)
            if made_directory and not any(file.parent.iterdir()):
                file.parent.rmdir()
    done = {_KINDS[kind], _Kind.MXFP4}
    weights = [(w, plan.sources[w.name]) for w in walk.weights if w.name in plan.sources]
    linears = [(w, found[0][0].kind in done) for w, found in weights if w.is_block_linear]
    packed = sum(is_packed for _, is_packed in linears)
    merged = sum(walk.is_adapted(w) for w in walk.weights)
    left = tuple(w.name_stem for w, is_packed in linears if not is_packed)
    return WriteResult(len(tensors), packed, merged, file.stat().st_size, left)


class _RowSource(NamedTuple):
    """Rows of a weight that are consecutive rows of a tensor.

    Attributes:
        rows: which ones; of a bias of experts, each number is a row.
        first: row of the tensor that the first of them is.
    """

    tensor: "_GgufTensor"
    rows: range
    first: int


@dataclass(eq=False)
class _GgufTensor:
    """A tensor of the file: rows of a weight of the base, or of those of all experts.

    Attributes:
        shape: as the file has it, the columns last.
        num_rows: of ``columns`` numbers each.
        offset: place of its first byte after the table.
    """

    name: str
    kind: _Kind
    shape: tuple[int, ...]
    num_rows: int
    columns: int
    offset: int = 0

    @property
    def row_bytes(self) -> int:
        block, size = gguf.GGML_QUANT_SIZES[self.kind]
        return self.columns // block * size

    @property
    def num_bytes(self) -> int:
        return self.num_rows * self.row_bytes


@dataclass
class _Plan:
    """The tensors of a file, and where the rows of each weight go, by the weight's name."""

    tensors: list[_GgufTensor]
    sources: dict[str, list[_RowSource]]


def _plan_tensors(
    walk: MergedWeights, model: GgufModelLayout, kind: str, dtype: torch.dtype
) -> _Plan:
    """Return the tensors of the file in the order of the base's."""
    tensors: dict[str, _GgufTensor] = {}
    sources: dict[str, list[_RowSource]] = {}
    for weight in walk.weights:
        for target in model.list_targets(weight):
            columns = _count_columns(weight, target.name)
            rows = range(math.prod(weight.info.shape) // columns)[target.rows]
            if target.name not in tensors:
                own = _choose_tensor_kind(walk, weight, target.name, kind, dtype)
                shape = _choose_shape(weight, target, len(rows), columns)
                count = math.prod(shape) // columns
                tensors[target.name] = _GgufTensor(target.name, own, shape, count, columns)
            first = len(rows) * (target.expert or 0)
            sources.setdefault(weight.name, []).append(
                _RowSource(tensors[target.name], rows, first)
            )
    place = 0
    for tensor in tensors.values():
        tensor.offset, place = place, _align_offset(place + tensor.num_bytes)
    return _Plan(list(tensors.values()), sources)


def _count_columns(weight: BaseWeight, name: str) -> int:
    """Return the numbers of a row that is never divided."""
    return 1 if name.endswith(_EXPERT_BIAS) else math.prod(weight.info.shape[1:])


def _choose_shape(
    weight: BaseWeight, target: RowTarget, rows: int, columns: int
) -> tuple[int, ...]:
    if target.expert is not None:
        assert isinstance(weight.linear, ExpertStack)
        return (weight.linear.experts, rows, columns)
    shape = tuple(weight.info.shape)
    if target.name.endswith(_EXPERT_BIAS):
        return (shape[0], rows // shape[0])
    if target.name.endswith(_VECTORS):
        return (math.prod(shape),)
    return (rows, *shape[1:])


def _append_tensors(
    walk: MergedWeights,
    model: GgufModelLayout,
    plan: _Plan,
    file: Path,
    factors: Tensor | None,
    dtype: torch.dtype,
) -> None:
    """Write the tensors after the table; each begins at a multiple of the alignment."""
    descriptor = os.open(file, os.O_WRONLY)
    try:
        begin = _align_offset(os.fstat(descriptor).st_size)
        last = plan.tensors[-1]
        end = begin + _align_offset(last.offset + last.num_bytes)
        for weight in walk.weights:
            if not (sources := plan.sources.get(weight.name, [])):
                continue
            for span in walk.iterate_spans(weight, model.get_row_multiple(weight)):
                rows = _encode_rows(walk, model, weight, span, sources[0].tensor, dtype)
                first = span.start * (len(rows) // len(span))
                for place, data in _place_rows(rows, first, sources):
                    write_exactly(descriptor, data.numpy().data, begin + place)
        if factors is not None:
            write_exactly(descriptor, factors.view(torch.uint8).numpy().data, end)
            end = _align_offset(end + factors.nbytes)
        os.ftruncate(descriptor, end)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _place_rows(
    rows: Tensor, first: int, sources: list[_RowSource]
) -> Iterator[tuple[int, Tensor]]:
    """Yield the bytes of each tensor among ``rows`` [n, row_bytes] of a weight, of which the first
    is number ``first``, and their place after the table."""
    for tensor, chosen, begin in sources:
        past, until = (
            len(range(chosen.start, min(row, chosen.stop), chosen.step))
            for row in (first, first + len(rows))
        )
        if mine := chosen[past:until]:
            picked = rows[mine.start - first : mine[-1] + 1 - first : mine.step]
            yield tensor.offset + (begin + past) * tensor.row_bytes, picked.reshape(-1)


def _align_offset(size: int) -> int:
    return int(gguf.GGUFWriter.ggml_pad(size, gguf.GGUF_DEFAULT_ALIGNMENT))


def _choose_tensor_kind(
    walk: MergedWeights, weight: BaseWeight, name: str, kind: str, dtype: torch.dtype
) -> _Kind:
    if len(weight.info.shape) < 2 or _ROUTER in name or name.endswith((_EXPERT_BIAS, *_VECTORS)):
        return _Kind.F32
    if not walk.is_packable(weight) or (kind != "f16" and weight.num_columns % BLOCK):
        return _FLOATS[dtype]
    if _keeps_mxfp4(walk, weight) or (kind == "mxfp4" and weight.is_expert):
        return _Kind.MXFP4
    if kind == "q4_1" and walk.state in ("codes", "trained"):
        bits, group = getattr(weight.codec, "bits", 0), getattr(weight.codec, "group_size", 0)
        if bits > 4 or group % BLOCK:
            raise UserError(
                "gguf Q4_1 supports codes of up to 4 bits in groups of 32 or a multiple, not "
                f"{bits} bits in groups of {group}; use --type q8_0 or f16"
            )
    return _KINDS[kind]


def _keeps_mxfp4(walk: MergedWeights, weight: BaseWeight) -> bool:
    """Whether the rows of training are in MXFP4, whole blocks, and are the weight's."""
    codec = weight.codec
    has_codes = codec is not None and codec.mxfp4_rows is not None
    return has_codes and weight.num_columns % BLOCK == 0 and walk.keeps_codes(weight)


def _encode_rows(
    walk: MergedWeights,
    model: GgufModelLayout,
    weight: BaseWeight,
    span: Span,
    tensor: _GgufTensor,
    dtype: torch.dtype,
) -> Tensor:
    """Return rows ``span`` in llama.cpp's order, uint8 [n, row_bytes]."""
    kind = tensor.kind
    if kind == _Kind.MXFP4 and _keeps_mxfp4(walk, weight):
        stored = pack_mxfp4_blocks(walk.read_packed_rows(weight, span), weight.num_columns)
    elif kind == _Kind.Q4_1 and walk.state in ("codes", "trained"):
        parts = walk.read_affine_parts(weight, span)
        stored = pack_q4_1_blocks(
            convert_to_bias_groups(parts, weight.num_columns, BLOCK, torch.float16)
        )
    elif kind == _Kind.Q8_0 and walk.state == "trained" and _has_affine_rows(weight):
        parts = walk.read_affine_parts(weight, span)
        stored = pack_symmetric_codes(parts, weight.num_columns)
    else:
        rows = walk.read_merged_rows(weight, span)
        if not weight.is_block_linear:
            rows = rows.to(weight.wide or dtype)  # the type that training used
        stored = _convert_rows(model.shift_rows(weight.path, rows.float()), kind)
    flat = model.reorder_rows(weight, stored).contiguous().view(-1)
    return flat.view(torch.uint8).view(-1, tensor.row_bytes)


def _has_affine_rows(weight: BaseWeight) -> bool:
    return weight.codec is not None and weight.codec.affine_rows is not None


def _convert_rows(rows: Tensor, kind: _Kind) -> Tensor:
    """Round float32 rows to a type of ggml."""
    if kind == _Kind.Q4_1:
        return pack_q4_1_blocks(quantize_bias_groups(rows, 4, BLOCK, torch.float16))
    if kind == _Kind.Q8_0:
        return pack_q8_0_blocks(rows)
    if kind == _Kind.MXFP4:
        return pack_mxfp4_blocks(Mxfp4Codec().quantize_to_packed(rows), rows.shape[-1])
    types = {own: dtype for dtype, own in _FLOATS.items()}
    return rows.to(types[kind])
