"""``gguf``: one file that llama.cpp runs, with tokenizer and metadata.

Linears of the blocks are stored in one of::

    Q4_1    32 weights: fp16 d, fp16 m, 16 bytes    w = d q + m    byte j: codes j, j + 16
    Q8_0    32 weights: fp16 d, 32 int8             w = d q        d = max |w| / 127
    F16

Q8_0 keeps 8-bit codes that were trained through the quantizer with ``base.quant.solver: absmax``,
whose zeros are 128: ``w = d (q - 128)``, to the last bit.

From an integer base with the adapter in its zeros, Q4_1 keeps codes and scales and rounds only
``m`` to fp16; codes of 2 and 3 bits fit, groups are split into blocks of 32. Embeddings, head and
linears whose ``in`` is not a multiple of 32 are stored in the run's compute type, norms and biases
in float32.

The ``gguf`` package writes header, metadata and tensor table; rows then follow at their offsets.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor

from dist_peft.core.errors import UserError
from dist_peft.core.host_memory import return_freed_memory
from dist_peft.core.span import Span
from dist_peft.export.base_weights import BaseWeight, split_stacks
from dist_peft.export.formats.gguf_model import GgufModelLayout
from dist_peft.export.formats.gguf_tokenizer import add_tokenizer_metadata
from dist_peft.export.formats.groups import BiasGroups, convert_to_bias_groups, quantize_bias_groups
from dist_peft.export.merged_weights import MergedWeights
from dist_peft.export.model_directory import WriteResult
from dist_peft.export.stopping import read_turn_end_ids
from dist_peft.quant.codec_defaults import AffineParts
from dist_peft.quant.packed_rows import divide_exactly
from dist_peft.store.fileio import (
    make_temporary_name,
    sync_directory,
    translate_write_errors,
    write_exactly,
)

__all__ = ["pack_q4_1_blocks", "pack_q8_0_blocks", "pack_symmetric_codes", "write_gguf_file"]

BLOCK = 32
_MIDDLE = 128
_IGNORED = np.dtype(np.float32)  # the writer ignores it if a GGML type is passed

_Kind = gguf.GGMLQuantizationType
_FLOATS = {torch.float32: _Kind.F32, torch.float16: _Kind.F16, torch.bfloat16: _Kind.BF16}
_ROUTER, _SHARED_GATE = ".ffn_gate_inp.", ".ffn_gate_inp_shexp.weight"
"""Tensors that llama.cpp has in float32; the second as a vector."""

_KINDS = {"q4_1": _Kind.Q4_1, "q8_0": _Kind.Q8_0, "f16": _Kind.F16}
_FILE_TYPES = {
    "q4_1": gguf.LlamaFileType.MOSTLY_Q4_1,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
}


def write_gguf_file(
    walk: MergedWeights, kind: str, file: Path, tokenizer: Path, name: str, dtype: torch.dtype
) -> WriteResult:
    """Write merged weights as a GGUF file, in one pass.

    Args:
        walk: the merged weights to write.
        kind: q4_1, q8_0 or f16, for linears of blocks.
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
    walk.weights = split_stacks(walk.weights, walk.skeleton)
    tensors = _plan_tensors(walk, model, kind, dtype)
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
                _append_tensors(walk, model, tensors, temporary, factors, dtype)
            walk.check_all_consumed()
            os.replace(temporary, file)
            sync_directory(file.parent)
        finally:
            temporary.unlink(missing_ok=True)
            if made_directory and not any(file.parent.iterdir()):
                file.parent.rmdir()
    weights = [(w, tensor.kind == _KINDS[kind]) for tensor in tensors for w in tensor.weights]
    packed = [w for w, is_packed in weights if w.is_block_linear and is_packed]
    merged = sum(walk.is_adapted(w) for w in walk.weights)
    left = tuple(w.name_stem for w, done in weights if w.is_block_linear and not done)
    return WriteResult(len(tensors), len(packed), merged, file.stat().st_size, left)


@dataclass(frozen=True)
class _GgufTensor:
    """A tensor of the file: a weight of the base, or those of all experts, in their order."""

    name: str
    kind: _Kind
    weights: tuple[BaseWeight, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        first = tuple(self.weights[0].info.shape)
        if self.weights[0].is_expert:
            return (len(self.weights), *first)
        return first[1:] if self.name.endswith(_SHARED_GATE) else first

    @property
    def num_bytes(self) -> int:
        return sum(_count_row_bytes(w, self.kind) * w.num_rows for w in self.weights)


def _plan_tensors(
    walk: MergedWeights, model: GgufModelLayout, kind: str, dtype: torch.dtype
) -> list[_GgufTensor]:
    """Return the tensors of the file in the order of the base's."""
    found: dict[str, list[BaseWeight]] = {}
    for weight in walk.weights:
        if (name := model.map_tensor_name(weight)) is not None:
            found.setdefault(name, []).append(weight)
    tensors = []
    for name, weights in found.items():
        weights.sort(key=lambda weight: weight.first)
        wide = _ROUTER in name or name.endswith(_SHARED_GATE)
        own = _Kind.F32 if wide else _choose_tensor_kind(walk, weights[0], kind, dtype)
        tensors.append(_GgufTensor(name, own, tuple(weights)))
    return tensors


def _append_tensors(
    walk: MergedWeights,
    model: GgufModelLayout,
    tensors: Iterable[_GgufTensor],
    file: Path,
    factors: Tensor | None,
    dtype: torch.dtype,
) -> None:
    """Append the tensors after the table; each begins at a multiple of the alignment."""
    descriptor = os.open(file, os.O_WRONLY)
    try:
        place = _align_offset(os.fstat(descriptor).st_size)
        for tensor in tensors:
            for weight in tensor.weights:
                for span in walk.iterate_spans(weight, model.get_row_multiple(weight)):
                    data = _encode_rows(walk, model, weight, span, tensor.kind, dtype)
                    write_exactly(descriptor, data.numpy().data, place)
                    place += data.numel()
            place = _align_offset(place)
        if factors is not None:
            write_exactly(descriptor, factors.view(torch.uint8).numpy().data, place)
            place = _align_offset(place + factors.nbytes)
        os.ftruncate(descriptor, place)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _align_offset(size: int) -> int:
    return int(gguf.GGUFWriter.ggml_pad(size, gguf.GGUF_DEFAULT_ALIGNMENT))


def _choose_tensor_kind(
    walk: MergedWeights, weight: BaseWeight, kind: str, dtype: torch.dtype
) -> _Kind:
    if len(weight.info.shape) < 2:
        return _Kind.F32
    if not walk.is_packable(weight) or (kind != "f16" and weight.num_columns % BLOCK):
        return _FLOATS[dtype]
    if kind == "q4_1" and walk.state in ("codes", "trained"):
        bits, group = getattr(weight.codec, "bits", 0), getattr(weight.codec, "group_size", 0)
        if bits > 4 or group % BLOCK:
            raise UserError(
                "gguf Q4_1 supports codes of up to 4 bits in groups of 32 or a multiple, not "
                f"{bits} bits in groups of {group}; use --type q8_0 or f16"
            )
    return _KINDS[kind]


def _count_row_bytes(weight: BaseWeight, kind: _Kind) -> int:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    columns = torch.Size(weight.info.shape[1:]).numel()
    return columns // block * size


def _encode_rows(
    walk: MergedWeights,
    model: GgufModelLayout,
    weight: BaseWeight,
    span: Span,
    kind: _Kind,
    dtype: torch.dtype,
) -> Tensor:
    """Return rows ``span`` as a flat tensor of bytes, in llama.cpp's row order."""
    if kind == _Kind.Q4_1 and walk.state in ("codes", "trained"):
        parts = walk.read_affine_parts(weight, span)
        stored = pack_q4_1_blocks(
            convert_to_bias_groups(parts, weight.num_columns, BLOCK, torch.float16)
        )
    elif kind == _Kind.Q8_0 and walk.state == "trained":
        parts = walk.read_affine_parts(weight, span)
        stored = pack_symmetric_codes(parts, weight.num_columns)
    else:
        rows = walk.read_merged_rows(weight, span)
        if not weight.is_block_linear:
            rows = rows.to(weight.wide or dtype)  # the type that training used
        rows = model.shift_rows(weight.path, rows.float())
        if kind == _Kind.Q4_1:
            stored = pack_q4_1_blocks(quantize_bias_groups(rows, 4, BLOCK, torch.float16))
        elif kind == _Kind.Q8_0:
            stored = pack_q8_0_blocks(rows)
        else:
            types = {own: dtype for dtype, own in _FLOATS.items()}
            stored = rows.to(types[kind]).contiguous()
    return model.reorder_rows(weight, stored).contiguous().reshape(-1).view(torch.uint8)


def pack_q4_1_blocks(groups: BiasGroups) -> Tensor:
    """Pack groups of 32 codes below 16 with fp16 scale and bias to uint8 [rows, blocks * 20]."""
    rows, blocks = groups.scale.shape
    codes = groups.codes.reshape(rows, blocks, 2, 16)
    payload = codes[:, :, 0] | codes[:, :, 1] << 4
    ends = torch.stack((groups.scale, groups.bias), -1).half().view(torch.uint8)
    return torch.cat((ends, payload), -1).flatten(1)


def pack_symmetric_codes(parts: AffineParts, columns: int) -> Tensor:
    """Pack 8-bit codes whose zeros are 128 to Q8_0, uint8 [n, in / 32 * 34]; nothing is rounded.

    Raises:
        UserError: another zero.
    """
    if bool((parts.zero != _MIDDLE).any()):
        raise UserError(
            "gguf Q8_0 has no zeros, and the run has others than those of base.quant.solver: "
            "absmax (adapter.through_zeros trains them): use --type f16"
        )
    rows, groups = parts.scale.shape
    codes = (parts.codes ^ _MIDDLE)[:, :columns].reshape(rows, -1, BLOCK)  # as int8, less 128
    repeat = parts.codes.shape[1] // groups // BLOCK
    scale = parts.scale.repeat_interleave(repeat, 1)[:, : codes.shape[1], None].contiguous()
    return torch.cat((scale.view(torch.uint8), codes), -1).flatten(1)


def pack_q8_0_blocks(rows: Tensor) -> Tensor:
    """Quantize float32 [n, in] to Q8_0, uint8 [n, in / 32 * 34], rounded to nearest."""
    blocks = rows.reshape(rows.shape[0], -1, BLOCK)
    scale = divide_exactly(blocks.abs().amax(-1, keepdim=True), 127)
    codes = torch.where(scale > 0, blocks / scale, 0.0).round_().clamp_(-127, 127).to(torch.int8)
    return torch.cat((scale.half().view(torch.uint8), codes.view(torch.uint8)), -1).flatten(1)
