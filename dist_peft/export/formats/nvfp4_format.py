"""``nvfp4``: weights in NVFP4, as compressed-tensors has them (``quant.nvfp4``).

    weight_packed        uint8 [out, in / 2]             two codes a byte, the even one low
    weight_scale         float8_e4m3fn [out, in / 16]
    weight_global_scale  float32 [1]                     the divisor of all scales

    w' = level[code] * (weight_scale / weight_global_scale)

Codes that were trained through the quantizer, and those of a base in NVFP4 that an adapter does not
change, are copied; other rows are rounded to nearest. Rows of a base in NVFP4 have the file's one
divisor. Rows that were encoded here have divisors of their own, powers of two: the smallest one,
that of the row with the largest weight, becomes the tensor's, and the scales of other rows are
multiplied by their ratio::

    scale' = E4M3(scale g / g_row)           exact down to 2**-6, and for powers of two below

Where that is not exact, trained codes are refused, as another model would be written; merged rows
keep the rounded scale, of groups that are 2**15 times smaller than the largest weight. All of a
weight is held until its last row, 4.5 bits a weight. Activations are not rounded (NVFP4A16).

``transformers`` 5.23 reads the experts of such files without their divisors. The comparison divides
them (``divide_experts``); a server that reads the format whole needs nothing.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dist_peft.adapters.export_limits import ExportContent
from dist_peft.core.config.run import BaseConfig
from dist_peft.core.errors import UserError
from dist_peft.core.span import Span
from dist_peft.export.base_weights import BaseWeight
from dist_peft.export.formats.expert_layout import ExpertLayout
from dist_peft.export.formats.export_format import PackedExport, PlannedExport
from dist_peft.export.formats.export_spec import ExportResult, ExportSpec
from dist_peft.export.formats.two_layouts import COMPRESSED_TENSORS, make_compressed_settings
from dist_peft.export.merged_weights import MergedWeights
from dist_peft.export.model_directory import TensorPiece, list_unpacked_linears
from dist_peft.export.verify import Comparison, compare_logits
from dist_peft.export.verify_formats import ConsumerRequest
from dist_peft.model.experts import ExpertStack
from dist_peft.model.skeleton import build_skeleton
from dist_peft.quant.codec import make_codec
from dist_peft.quant.nvfp4 import NVFP4_GROUP, Nvfp4Codec
from dist_peft.store.index import SafetensorsIndex
from dist_peft.store.reader import RowReader
from dist_peft.store.writer import TensorSpec

__all__ = ["Nvfp4Export", "Nvfp4Packer", "divide_experts", "share_divisor"]

_CODEC = Nvfp4Codec()


class _Nvfp4Parts(NamedTuple):
    """Codes ``uint8 [n, in / 2]``, scales E4M3 ``[n, in / 16]`` and divisors ``[n, 1]``."""

    codes: Tensor
    scale: Tensor
    divisor: Tensor


def share_divisor(scale: Tensor, divisor: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Return scales with one divisor, the smallest.

    Args:
        scale: ``float8_e4m3fn [n, groups]``.
        divisor: ``float32 [n, 1]``.

    Returns:
        Scales, the divisor ``[1]``, and whether all quotients are the same as before.
    """
    least = divisor.min()
    shared = (scale.float() * (least / divisor)).to(torch.float8_e4m3fn)
    is_exact = torch.equal(shared.float() / least, scale.float() / divisor)
    return shared, least.view(1), is_exact


class Nvfp4Packer:
    """Pack weights as ``nvfp4-pack-quantized`` of compressed-tensors."""

    row_multiple = 1

    def __init__(self) -> None:
        self._rows: dict[str, list[_Nvfp4Parts]] = {}  # by weight: several are packed at a time

    def can_pack(self, weight: BaseWeight) -> bool:
        return weight.num_columns % NVFP4_GROUP == 0

    def plan_tensors(self, weight: BaseWeight) -> list[TensorSpec]:
        out, columns, stem = weight.num_rows, weight.num_columns, weight.name_stem
        scales = (out, columns // NVFP4_GROUP)
        return [
            TensorSpec(f"{stem}.weight_packed", torch.uint8, (out, columns // 2)),
            TensorSpec(f"{stem}.weight_scale", torch.float8_e4m3fn, scales),
            TensorSpec(f"{stem}.weight_global_scale", torch.float32, (1,)),
        ]

    def pack_rows(
        self, walk: MergedWeights, weight: BaseWeight, span: Span
    ) -> Iterable[TensorPiece]:
        codec = weight.codec
        if walk.keeps_codes(weight) and codec is not None and codec.nvfp4_rows is not None:
            packed = walk.read_packed_rows(weight, span)
        else:
            packed = _CODEC.quantize_to_packed(walk.read_merged_rows(weight, span).float())
        rows = _Nvfp4Parts(*_CODEC.split_packed_rows(packed, weight.num_columns))
        self._rows.setdefault(weight.name, []).append(rows)
        if span.stop == weight.num_rows:
            yield from self._pack_collected_weight(weight, must_be_exact=walk.state == "trained")

    def _pack_collected_weight(
        self, weight: BaseWeight, *, must_be_exact: bool
    ) -> Iterator[TensorPiece]:
        collected = self._rows.pop(weight.name)
        codes, scale, divisor = (torch.cat(part) for part in zip(*collected, strict=True))
        shared, least, is_exact = share_divisor(scale, divisor)
        if must_be_exact and not is_exact:
            raise UserError(
                f"{weight.name}: scales of rows trained through the quantizer are too far apart "
                "for the one divisor that NVFP4 has in a file; use dist-peft merge, or "
                "base.quant.kind: mxfp4"
            )
        stem = weight.name_stem
        yield TensorPiece(f"{stem}.weight_packed", codes, 0)
        yield TensorPiece(f"{stem}.weight_scale", shared, 0)
        yield TensorPiece(f"{stem}.weight_global_scale", least, 0)

    def make_config(self, walk: MergedWeights, unpacked: list[str]) -> Mapping[str, Any]:
        weights = {
            "num_bits": 4,
            "type": "float",
            "symmetric": True,
            "strategy": "tensor_group",
            "group_size": NVFP4_GROUP,
            "scale_dtype": "torch.float8_e4m3fn",
        }
        return make_compressed_settings(
            "nvfp4-pack-quantized", weights, list_unpacked_linears(walk, unpacked)
        )


@torch.no_grad()
def divide_experts(model: nn.Module, directory: Path) -> str:
    """Divide the experts that ``transformers`` (5.23) has read without ``weight_global_scale``.

    Args:
        model: as ``transformers`` loaded it.
        directory: of its files.

    Returns:
        A note for the report; empty where nothing was changed.
    """
    skeleton = build_skeleton(BaseConfig(path=str(directory)), directory)
    note = ""
    with RowReader(skeleton.index) as reader:
        for path, stack in skeleton.model.named_modules():
            if not isinstance(stack, ExpertStack) or stack.stored is None:
                continue
            weight = model.get_parameter(path)
            rows = weight.data.view(-1, weight.shape[-1])
            first = stack.stored.read_packed_rows(reader, Span(0, 1))
            own = stack.codec.dequantize_rows(first, stack.in_features, torch.float32)
            if float(rows[0].abs().max()) <= 2 * float(own.abs().max()):
                continue  # a version that divides
            for piece in stack.pieces:
                stem = piece.name.removesuffix("weight")
                rows[piece.span.slice] /= reader.read_rows(f"{stem}weight_global_scale")
            note = ", experts divided by weight_global_scale, which it leaves out"
    return note


class Nvfp4Export(PackedExport):
    """NVFP4 of compressed-tensors."""

    name = "nvfp4"
    keeps = "merged, rounded to NVFP4; codes of NVFP4 that are not adapted or were trained"
    loads_with = "transformers with compressed-tensors"
    joins_parts = True
    experts = ExpertLayout(dense_stacks=True)
    consumer = COMPRESSED_TENSORS

    def get_content(self, options: Mapping[str, Any]) -> ExportContent:
        """Return ``merged``."""
        return "merged"

    def find_packing_obstacle(self, run: PlannedExport, options: Mapping[str, Any]) -> str | None:
        if run.limits.trained_codes and run.codec.nvfp4_rows is None:
            return "the codes that are trained are not of base.quant.kind nvfp4"
        return None

    def verify_export(self, job: ExportSpec, request: ConsumerRequest) -> tuple[str, Comparison]:
        names = SafetensorsIndex.open(request.path).tensors
        if not any(".experts." in name and name.endswith("_global_scale") for name in names):
            return super().verify_export(job, request)
        prepare = partial(divide_experts, directory=request.path)
        consumer, logits = replace(COMPRESSED_TENSORS, prepare=prepare).compute_logits(request)
        return consumer, compare_logits(logits, request.probe)

    def write_export(self, job: ExportSpec) -> ExportResult:
        if not job.trained_codes:
            how = "merged, rounded to nearest: nvfp4-pack-quantized"
            return self.write_directory(job, job.rows_state, Nvfp4Packer(), how)
        if make_codec(job.base.quant, job.compute_dtype).nvfp4_rows is None:
            raise UserError(
                "nvfp4 keeps codes of base.quant.kind nvfp4, and this run trained others through "
                "the quantizer: choose the format of the base's kind, or hf-bf16"
            )
        how = "the trained codes: nvfp4-pack-quantized"
        return self.write_directory(job, "trained", Nvfp4Packer(), how, exact=True)
