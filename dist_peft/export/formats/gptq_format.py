"""``gptq``: affine groups in GPTQ's layout ``gptq_v2``, whose zeros are stored without offset.

Tensors of a linear ``[out, in]``; words are int32, codes a dense LSB-first bit stream::

    qweight [in * bits / 32, out]         along in
    scales  [in / group, out]             float16
    qzeros  [in / group, out * bits / 32]
    g_idx   [in]                          column -> group

Columns of a base in act-order keep their groups (``g_idx``, ``desc_act: true``) where its codes are
kept. ``out`` is last, so that rows of a weight are columns of its tensors: the packed tensors of
one linear are assembled in memory (``bits / 16`` of its bf16 size).
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from dist_peft.adapters.adapter_format import find_format
from dist_peft.adapters.directory import read_adapter_directory
from dist_peft.core.errors import UserError
from dist_peft.core.span import Span
from dist_peft.export.base_weights import BaseWeight
from dist_peft.export.formats.export_format import PlannedExport
from dist_peft.export.formats.export_spec import ExportSpec
from dist_peft.export.formats.gptq_consumer import (
    GPTQ_EXPERTS,
    GPTQ_TRANSFORMERS,
    verify_with_gptqmodel,
)
from dist_peft.export.formats.groups import pack_code_words
from dist_peft.export.formats.integer_zero import (
    IntegerZeroExport,
    IntegerZeroPacker,
    pack_along_rows,
    quantize_integer_zeros,
)
from dist_peft.export.merged_weights import MergedWeights
from dist_peft.export.model_directory import TensorPiece
from dist_peft.export.verify import Comparison
from dist_peft.export.verify_formats import ConsumerRequest
from dist_peft.quant.affine import AffineCodec, AffineParts
from dist_peft.store.writer import TensorSpec

__all__ = ["GptqExport", "GptqPacker"]


class GptqPacker(IntegerZeroPacker):
    """Pack linears in GPTQ's ``checkpoint_format: gptq_v2``.

    Args:
        codec: bits and group size; quantizes merged rows.
        dtype: unused by the format, whose scales are float16.
    """

    def __init__(self, codec: AffineCodec, dtype: torch.dtype) -> None:
        super().__init__(codec, dtype)
        self._parts: dict[str, list[AffineParts]] = {}  # by weight: several are packed at a time

    def can_pack(self, weight: BaseWeight) -> bool:
        return self._fits_word_size(weight.num_columns) and weight.num_rows % 32 == 0

    def plan_tensors(self, weight: BaseWeight) -> list[TensorSpec]:
        bits, out, groups = self.codec.bits, weight.num_rows, self._count_groups(weight)
        stem = weight.name_stem
        return [
            TensorSpec(f"{stem}.qweight", torch.int32, (weight.num_columns * bits // 32, out)),
            TensorSpec(f"{stem}.qzeros", torch.int32, (groups, out * bits // 32)),
            TensorSpec(f"{stem}.scales", torch.float16, (groups, out)),
            TensorSpec(f"{stem}.g_idx", torch.int32, (weight.num_columns,)),
        ]

    def pack_rows(
        self, walk: MergedWeights, weight: BaseWeight, span: Span
    ) -> Iterable[TensorPiece]:
        bits, stem = self.codec.bits, weight.name_stem
        parts = quantize_integer_zeros(walk, weight, span, self.codec)
        words = pack_code_words(parts.codes, bits, torch.int32)
        zeros = pack_along_rows(parts.zero, bits)
        collected = self._parts.setdefault(weight.name, [])
        collected.append(AffineParts(words.T, parts.scale.half().T, zeros.T))
        if span.stop < weight.num_rows:
            return
        words, scale, zeros = (torch.cat(part, 1) for part in zip(*collected, strict=True))
        del self._parts[weight.name]
        yield TensorPiece(f"{stem}.qweight", words, 0)
        yield TensorPiece(f"{stem}.scales", scale, 0)
        yield TensorPiece(f"{stem}.qzeros", zeros, 0)
        index = torch.arange(weight.num_columns, dtype=torch.int32) // self.codec.group_size
        if (ordered := walk.find_column_order(weight)) is not None:
            index = ordered.list_column_groups(walk.read_packed_rows(weight, Span(0, 1)))
        yield TensorPiece(f"{stem}.g_idx", index, 0)

    def make_config(self, walk: MergedWeights, unpacked: list[str]) -> Mapping[str, Any]:
        how: dict[str, Any] = {
            "quant_method": "gptq",
            "bits": self.codec.bits,
            "group_size": self.codec.group_size,
            "desc_act": any(walk.find_column_order(weight) for weight in walk.weights),
            "sym": False,
            "checkpoint_format": "gptq_v2",
            "true_sequential": True,
            "lm_head": False,
        }
        if unpacked:  # linears inside blocks: gptqmodel reads the first key, optimum the second
            how["dynamic"] = {f"-:^{path.replace('.', chr(92) + '.')}$": {} for path in unpacked}
            inside = {w.module_path for w in walk.weights if w.is_block_linear} - set(unpacked)
            stripped = {_split_at_block(path)[1] for path in inside}
            how["modules_in_block_to_quantize"] = [sorted(stripped)]
        blocks = {_split_at_block(w.module_path)[0] for w in walk.weights if w.is_block_linear}
        if blocks and blocks != {"model.layers"}:  # optimum knows decoders, not BERT
            how["block_name_to_quantize"] = min(blocks)
        return {"quantization_config": how}


def _split_at_block(path: str) -> tuple[str, str]:
    """Return the list of blocks and the path inside the block: ``model.layers.3.mlp.up_proj`` ->
    ``model.layers`` and ``mlp.up_proj``."""
    names = path.split(".")
    first = next(i for i, name in enumerate(names) if name.isdigit())
    return ".".join(names[:first]), ".".join(names[first + 1 :])


class GptqExport(IntegerZeroExport):
    """GPTQ, in the layout gptq_v2."""

    name = "gptq"
    keeps = "the integer base unchanged; separate adapter"
    loads_with = "transformers with gptqmodel"
    packer = GptqPacker
    consumer = GPTQ_TRANSFORMERS
    experts = GPTQ_EXPERTS
    keeps_column_order = True

    def verify_export(self, job: ExportSpec, request: ConsumerRequest) -> tuple[str, Comparison]:
        return verify_with_gptqmodel(request)

    def find_packing_obstacle(self, run: PlannedExport, options: Mapping[str, Any]) -> str | None:
        return super().find_packing_obstacle(run, options) or run.limits.gptq_linears

    def _check_base_kept(self, job: ExportSpec, codec: AffineCodec) -> None:
        if job.integer_codec is not None and not _is_loaded_on_gptq_linears(job.adapter_dir):
            raise UserError(
                "this format keeps the adapter separate from GPTQ linears, on which PEFT does not "
                "support this method; choose compressed-tensors or hf-bf16"
            )
        super()._check_base_kept(job, codec)


def _is_loaded_on_gptq_linears(adapter_dir: Path) -> bool:
    known = find_format(read_adapter_directory(adapter_dir, values=False).config)
    return known is not None and known.on_gptq_linears
