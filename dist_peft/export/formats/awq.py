"""``awq``: codes that were trained through the quantizer in AWQ's layout ``gemm``.

4 bits, integer zeros, weights stored transposed; the nibbles of a word, lowest first, are those of
the neighbouring outputs 0 2 4 6 1 3 5 7::

    qweight [in, out / 8]    qzeros [in / g, out / 8]    int32
    scales  [in / g, out]                                float16

``model.prequantized.integer.AwqFormat`` reads it. Runs with a separate adapter have ``gptq`` and
``compressed-tensors``, with the same codes.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from dist_peft.adapters.export_limits import ExportContent
from dist_peft.core.errors import UserError
from dist_peft.core.span import Span
from dist_peft.export.base_weights import BaseWeight
from dist_peft.export.formats.export_format import PlannedExport
from dist_peft.export.formats.export_spec import ExportResult, ExportSpec
from dist_peft.export.formats.groups import pack_code_words
from dist_peft.export.formats.integer_zero import (
    IntegerZeroExport,
    IntegerZeroPacker,
    quantize_integer_zeros,
)
from dist_peft.export.merged_weights import MergedWeights
from dist_peft.export.model_directory import TensorPiece, list_unpacked_linears
from dist_peft.export.verify_consumer import run_plain_transformers
from dist_peft.export.verify_formats import ProcessConsumer
from dist_peft.quant.affine import AffineCodec, AffineParts
from dist_peft.store.writer import TensorSpec

__all__ = ["AwqExport", "AwqPacker"]

_BITS = 4
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of 8 neighbouring outputs has each nibble of a word, from the lowest."""


def _pack_outputs(numbers: Tensor) -> Tensor:
    """``uint8 [n, m]`` of 4 bits -> words along dimension 0, transposed: ``int32 [m, n / 8]``."""
    ordered = numbers.T.unflatten(1, (-1, 8))[:, :, _ORDER].flatten(1)
    return pack_code_words(ordered, _BITS, torch.int32)


class AwqPacker(IntegerZeroPacker):
    """Pack linears as AWQ's ``gemm``; ``dtype`` is unused: its scales are float16."""

    def __init__(self, codec: AffineCodec, dtype: torch.dtype) -> None:
        super().__init__(codec, dtype)
        self._parts: dict[str, list[AffineParts]] = {}  # by weight: several are packed at a time

    def can_pack(self, weight: BaseWeight) -> bool:
        return self._fits_word_size(weight.num_columns) and weight.num_rows % 8 == 0

    def plan_tensors(self, weight: BaseWeight) -> list[TensorSpec]:
        out, groups, stem = weight.num_rows, self._count_groups(weight), weight.name_stem
        return [
            TensorSpec(f"{stem}.qweight", torch.int32, (weight.num_columns, out // 8)),
            TensorSpec(f"{stem}.qzeros", torch.int32, (groups, out // 8)),
            TensorSpec(f"{stem}.scales", torch.float16, (groups, out)),
        ]

    def pack_rows(
        self, walk: MergedWeights, weight: BaseWeight, span: Span
    ) -> Iterable[TensorPiece]:
        stem = weight.name_stem
        parts = quantize_integer_zeros(walk, weight, span, self.codec)
        own = AffineParts(
            _pack_outputs(parts.codes), parts.scale.half().T, _pack_outputs(parts.zero)
        )
        collected = self._parts.setdefault(weight.name, [])
        collected.append(own)
        if span.stop < weight.num_rows:
            return
        words, scale, zeros = (torch.cat(part, 1) for part in zip(*collected, strict=True))
        del self._parts[weight.name]
        yield TensorPiece(f"{stem}.qweight", words, 0)
        yield TensorPiece(f"{stem}.scales", scale, 0)
        yield TensorPiece(f"{stem}.qzeros", zeros, 0)

    def make_config(self, walk: MergedWeights, unpacked: list[str]) -> Mapping[str, Any]:
        how = {
            "quant_method": "awq",
            "bits": _BITS,
            "group_size": self.codec.group_size,
            "version": "gemm",
            "zero_point": True,
            "modules_to_not_convert": list_unpacked_linears(walk, unpacked),
        }
        return {"quantization_config": how}


class AwqExport(IntegerZeroExport):
    """AWQ, in the layout gemm."""

    name = "awq"
    keeps = "4-bit integer codes that were trained through the quantizer"
    loads_with = "transformers with gptqmodel"
    options = ()
    consumer = ProcessConsumer(
        "awq",
        run_plain_transformers,
        "gptqmodel",
        "DIST_PEFT_GPTQ_PYTHON",
        "pip install gptqmodel optimum",
        note="; it may compile kernels first",
        options=("float32", "gptqmodel"),
    )

    def get_content(self, options: Mapping[str, Any]) -> ExportContent:
        """Return ``merged``."""
        return "merged"

    def find_packing_obstacle(self, run: PlannedExport, options: Mapping[str, Any]) -> str | None:
        rows = run.codec.affine_rows
        if not run.limits.trained_codes or rows is None or rows.bits != _BITS:
            return "for 4-bit integer codes trained through the quantizer"
        return super().find_packing_obstacle(run, options)

    def write_export(self, job: ExportSpec) -> ExportResult:
        codec = job.integer_codec
        if not job.trained_codes or codec is None or codec.bits != _BITS:
            raise UserError(
                "awq holds 4-bit integer codes that were trained through the quantizer "
                "(adapter.through_quantizer), and this run has none: choose gptq or "
                "compressed-tensors"
            )
        packer = AwqPacker(codec, torch.float16)
        how = f"the trained codes, {_BITS} bits in groups of {codec.group_size}"
        return self.write_directory(job, "trained", packer, how, exact=True)
