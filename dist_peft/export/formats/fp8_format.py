"""``fp8``: weights in FP8 (E4M3) with a float32 scale for each tile or row.

A scale ``s = max |w| / 448`` belongs to the weights of one tile, and ``w' = E4M3(w / s) * s``::

    tile   as DeepSeek-V3 and Qwen FP8 are published, quant_method fp8
           weight            float8_e4m3fn [out, in]
           weight_scale_inv  float32 [out / 128, in / 128]
    row    compressed-tensors, format float-quantized, strategy channel
           weight            float8_e4m3fn [out, in]
           weight_scale      float32 [out, 1]

Codes of an FP8 base with the same tiles are copied where no adapter changes them. Those that were
trained through the quantizer have a scale for each group of a row (``quant.fp8``): they are tiles
of one row, or ``row`` where a group is the whole row. Of a base in FP8 tiles they have its tiles
and scales. ``transformers`` decodes both from the shape of the scales alone, so that a weight with
a part of a tile at its end stays dense.

Activations are not rounded by these settings on a CPU; kernels of GPUs round them (``fp8``:
``activation_scheme: dynamic``).
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from dist_peft.adapters.export_limits import ExportContent
from dist_peft.core.errors import UserError
from dist_peft.core.span import Span
from dist_peft.export.base_weights import BaseWeight
from dist_peft.export.formats.expert_layout import LLAMA4_LINEARS, ExpertLayout
from dist_peft.export.formats.export_format import (
    GROUP_SIZE,
    ExportOption,
    PlannedExport,
)
from dist_peft.export.formats.export_spec import ExportResult, ExportSpec
from dist_peft.export.formats.two_layouts import (
    COMPRESSED_TENSORS,
    TwoLayoutsExport,
    make_compressed_settings,
)
from dist_peft.export.merged_weights import MergedWeights
from dist_peft.export.model_directory import TensorPiece, list_unpacked_linears
from dist_peft.export.verify_formats import Consumer, TransformersConsumer
from dist_peft.quant.codec import make_codec
from dist_peft.quant.packed_rows import divide_exactly
from dist_peft.store.writer import TensorSpec

__all__ = ["Fp8Export", "Fp8Packer", "quantize_fp8_tiles"]

Scales = Literal["tile", "row"]

SCALES = ExportOption(
    "scales",
    "weights that share a scale: a tile of 128 x 128 (default; --group-size N: N x N), or a row",
    {"choices": ("tile", "row")},
)

_LARGEST = 448.0
_TILE = 128


def quantize_fp8_tiles(weights: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Quantize ``[n, in]`` in tiles of ``rows`` x ``columns``, which divide both.

    Returns:
        Codes ``float8_e4m3fn [n, in]`` and scales ``float32 [n / rows, in / columns]``; 1 for a
        tile of zeros.
    """
    tiles = weights.float().unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
    largest = tiles.abs().amax((1, 3))
    scale = divide_exactly(largest, _LARGEST).clamp_(min=torch.finfo(torch.float32).tiny)
    scale = torch.where(largest > 0, scale, 1.0)
    codes = (tiles / scale[:, None, :, None]).clamp_(-_LARGEST, _LARGEST)
    return codes.to(torch.float8_e4m3fn).reshape(weights.shape), scale


class Fp8Packer:
    """Pack weights in FP8.

    Args:
        rows, columns: of a tile; ``columns`` 0: a scale for each whole row.
    """

    def __init__(self, rows: int, columns: int) -> None:
        self.rows, self.columns = rows, columns
        self.row_multiple = rows

    @property
    def _scale_name(self) -> str:
        return "weight_scale_inv" if self.columns else "weight_scale"

    def can_pack(self, weight: BaseWeight) -> bool:
        columns = self.columns or weight.num_columns
        return weight.num_rows % self.rows == 0 and weight.num_columns % columns == 0

    def plan_tensors(self, weight: BaseWeight) -> list[TensorSpec]:
        out, columns, stem = weight.num_rows, weight.num_columns, weight.name_stem
        scales = (out // self.rows, columns // (self.columns or columns))
        return [
            TensorSpec(f"{stem}.weight", torch.float8_e4m3fn, (out, columns)),
            TensorSpec(f"{stem}.{self._scale_name}", torch.float32, scales),
        ]

    def pack_rows(
        self, walk: MergedWeights, weight: BaseWeight, span: Span
    ) -> Iterable[TensorPiece]:
        kept = self._read_kept_codes(walk, weight, span) if walk.keeps_codes(weight) else None
        if kept is None:
            merged = walk.read_merged_rows(weight, span)
            kept = quantize_fp8_tiles(merged, self.rows, self.columns or weight.num_columns)
        codes, scale = kept
        stem = weight.name_stem
        yield TensorPiece(f"{stem}.weight", codes, span.start)
        yield TensorPiece(f"{stem}.{self._scale_name}", scale, span.start // self.rows)

    def _read_kept_codes(
        self, walk: MergedWeights, weight: BaseWeight, span: Span
    ) -> tuple[Tensor, Tensor] | None:
        """Return codes and scales of training; None: they have other tiles."""
        codec, columns = weight.codec, weight.num_columns
        rows = None if codec is None else codec.fp8_rows
        if rows is None or rows.count_groups(columns) != columns // (self.columns or columns):
            return None
        codes, scale = rows.split_packed_rows(walk.read_packed_rows(weight, span), columns)
        scale = scale.unflatten(0, (-1, self.rows))
        if not torch.equal(scale, scale[:, :1].expand_as(scale)):
            return None
        return codes, scale[:, 0]

    def make_config(self, walk: MergedWeights, unpacked: list[str]) -> Mapping[str, Any]:
        dense = list_unpacked_linears(walk, unpacked)
        if self.columns:
            how: dict[str, Any] = {
                "quant_method": "fp8",
                "activation_scheme": "dynamic",
                "weight_block_size": [self.rows, self.columns],
                "modules_to_not_convert": dense,
            }
            return {"quantization_config": how}
        weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
        return make_compressed_settings("float-quantized", weights, dense)


_TILES = TransformersConsumer(
    needs=("accelerate",), quantization=("FineGrainedFP8Config", {"dequantize": True})
)


class Fp8Export(TwoLayoutsExport):
    """FP8 with scales for tiles or rows."""

    name = "fp8"
    keeps = "merged, rounded to FP8; codes that were trained through the quantizer"
    loads_with = "transformers"
    options = (SCALES, GROUP_SIZE)
    experts = ExpertLayout(dense_stacks=True)
    by_method: ClassVar[Mapping[str, Consumer]] = {
        "fp8": _TILES,
        "compressed-tensors": COMPRESSED_TENSORS,
    }

    def choose_experts(self, model: nn.Module, options: Mapping[str, Any]) -> ExpertLayout:
        """Return the form; ``transformers`` makes linears of Llama 4's for compressed-tensors."""
        by_row = LLAMA4_LINEARS if options.get(SCALES.key) == "row" else frozenset()
        return replace(self.experts, linear_types=by_row)

    def get_content(self, options: Mapping[str, Any]) -> ExportContent:
        """Return ``merged``."""
        return "merged"

    def find_idle_options(self, options: Mapping[str, Any]) -> list[str]:
        idle = options.get(SCALES.key) == "row" and options.get(GROUP_SIZE.key)
        return ["--group-size has no effect with --scales row"] if idle else []

    def find_packing_obstacle(self, run: PlannedExport, options: Mapping[str, Any]) -> str | None:
        if run.limits.trained_codes and run.codec.fp8_rows is None:
            return "the codes that are trained are not of base.quant.kind fp8"
        return None

    def write_export(self, job: ExportSpec) -> ExportResult:
        if job.trained_codes:
            packer = _make_trained_packer(job)
            job.check_output()
            how = f"the trained codes, {_describe_tile(packer)}"
            return self.write_directory(job, "trained", packer, how, exact=True)
        size = int(job.options.get(GROUP_SIZE.key) or _TILE)
        by_row = job.options.get(SCALES.key) == "row"
        packer = Fp8Packer(1, 0) if by_row else Fp8Packer(size, size)
        how = f"merged, rounded to nearest: {_describe_tile(packer)}"
        return self.write_directory(job, job.rows_state, packer, how)


def _make_trained_packer(job: ExportSpec) -> Fp8Packer:
    """Return the packer of a run's trained codes.

    Raises:
        UserError: they are no FP8.
    """
    rows = make_codec(job.base.quant, job.compute_dtype).fp8_rows
    if rows is None:
        raise UserError(
            "fp8 keeps codes of base.quant.kind fp8, and this run trained others through the "
            "quantizer: choose the format of the base's kind, or hf-bf16"
        )
    if rows.group_size >= 2**16:
        return Fp8Packer(1, 0)
    with job.open_weights("trained") as walk:
        packed = walk.skeleton.prequantized
        tile = None if packed is None else packed.scale_tile
    return Fp8Packer(1 if tile is None else tile[0], rows.group_size)


def _describe_tile(packer: Fp8Packer) -> str:
    if not packer.columns:
        return "a scale a row"
    return f"a scale for each {packer.rows} x {packer.columns}"
