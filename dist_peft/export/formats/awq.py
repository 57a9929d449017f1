"""``awq``: merged rows in 4 bits, or codes trained through the quantizer, in AWQ's layout ``gemm``.

4 bits, integer zeros, weights stored transposed; the nibbles of a word, lowest first, are those of
the neighbouring outputs 0 2 4 6 1 3 5 7::

    qweight [in, out / 8]    qzeros [in / g, out / 8]    int32
    scales  [in / g, out]                                float16

``model.prequantized.integer.AwqFormat`` reads it. Merged rows are rounded to nearest in groups,
with ``--calibration`` after AWQ's search for factors of the columns (Lin et al. 2023;
``awq_search``). Runs with a separate adapter have ``gptq`` and ``compressed-tensors``.
"""

import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dist_peft.adapters.export_limits import ExportContent
from dist_peft.core.errors import UserError
from dist_peft.core.span import Span
from dist_peft.export.base_weights import BaseWeight
from dist_peft.export.formats.awq_calibration import CalibratedFactors, search_model_factors
from dist_peft.export.formats.export_format import GROUP_SIZE, ExportOption, PlannedExport
from dist_peft.export.formats.export_spec import ExportResult, ExportSpec
from dist_peft.export.formats.gptq_consumer import (
    GPTQ_EXPERTS,
    GPTQ_TRANSFORMERS,
    verify_with_gptqmodel,
)
from dist_peft.export.formats.groups import pack_code_words
from dist_peft.export.formats.integer_zero import (
    IntegerZeroExport,
    IntegerZeroPacker,
    quantize_integer_zeros,
)
from dist_peft.export.merge_weights import merge_model
from dist_peft.export.merged_weights import MergedWeights
from dist_peft.export.model_directory import TensorPiece, list_unpacked_linears
from dist_peft.export.verify import Comparison
from dist_peft.export.verify_formats import ConsumerRequest
from dist_peft.quant.affine import AffineCodec, AffineParts
from dist_peft.store.writer import TensorSpec

__all__ = ["AwqExport", "AwqPacker"]

_BITS, _GROUP = 4, 128
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
        return self._fits_word_size(weight.num_columns) and weight.num_rows % 32 == 0

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


CALIBRATION = ExportOption(
    "calibration",
    "text file (.txt, or .jsonl with a text a line) for AWQ's search of factors; default: none, "
    "plain rounding",
    {"type": Path},
)


class AwqExport(IntegerZeroExport):
    """AWQ, in the layout gemm."""

    name = "awq"
    keeps = "merged, rounded to 4 bits; codes that were trained through the quantizer"
    loads_with = "transformers with gptqmodel"
    options = (GROUP_SIZE, CALIBRATION)
    consumer = GPTQ_TRANSFORMERS
    experts = GPTQ_EXPERTS

    def get_content(self, options: Mapping[str, Any]) -> ExportContent:
        """Return ``merged``."""
        return "merged"

    def find_packing_obstacle(self, run: PlannedExport, options: Mapping[str, Any]) -> str | None:
        rows = run.codec.affine_rows
        if run.limits.trained_codes:
            if rows is None or rows.bits != _BITS:
                return f"awq has {_BITS} bits, and the codes that are trained are others"
            return super().find_packing_obstacle(run, options)
        return None

    def write_export(self, job: ExportSpec) -> ExportResult:
        own = job.integer_codec
        if job.trained_codes:
            codec = job.make_target_codec(_GROUP)
            if own is None or own.bits != _BITS:
                raise UserError(
                    f"awq holds {_BITS}-bit integer codes, and the codes that this run trained "
                    "through the quantizer are others: choose the format of the base's kind, or "
                    "hf-bf16"
                )
            if job.options.get(CALIBRATION.key) is not None:
                raise UserError(
                    "--calibration searches factors before weights are rounded, and this run "
                    "trained its codes; leave it out"
                )
            how = f"the trained codes, {_BITS} bits in groups of {codec.group_size}"
            packer = AwqPacker(codec, torch.float16)
            return self.write_directory(job, "trained", packer, how, exact=True)
        group = job.options.get(GROUP_SIZE.key) or (own.group_size if own else _GROUP)
        codec = AffineCodec(_BITS, int(group))
        size = f"{_BITS} bits in groups of {codec.group_size}"
        packer = AwqPacker(codec, torch.float16)
        if (file := job.options.get(CALIBRATION.key)) is None:
            how = f"merged, rounded to nearest: {size}"
            return self.write_directory(job, job.rows_state, packer, how)
        found = self._search_factors(job, file, codec)
        how = f"merged, AWQ's factors: {size}; {found.describe()}"
        scaled = replace(job, rescale=found.scale_rows)
        return self.write_directory(scaled, job.rows_state, packer, how)

    def _search_factors(self, job: ExportSpec, file: Path, codec: AffineCodec) -> CalibratedFactors:
        """Search on the merged model, which is written next to the output for that time."""
        job.check_output()
        job.out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=job.out.parent, prefix=".awq-") as scratch:
            merged = Path(scratch) / "merged"
            into: Literal["original", "decoded"] = "decoded" if job.pooled else job.into
            merge_model(
                job.base,
                job.directory,
                job.adapter_dir,
                merged,
                into=into,
                dtype=job.compute_dtype,
                chunk_bytes=job.chunk_bytes,
            )
            return search_model_factors(job, merged, file, codec)

    def verify_export(self, job: ExportSpec, request: ConsumerRequest) -> tuple[str, Comparison]:
        return verify_with_gptqmodel(request)
