"""``compressed-tensors``: affine groups in its layout pack-quantized.

Tensors of a linear ``[out, in]``; words are int32, codes a dense LSB-first bit stream::

    weight_packed      [out, in * bits / 32]
    weight_scale       [out, in / group]
    weight_zero_point  [out * bits / 32, in / group]     only of asymmetric codes
    weight_shape       int64 [2]

``transformers`` stacks the experts of a mixture while it loads them, and reads ``weight_packed``,
``weight_scale`` and ``weight_shape`` then, no zero points: a mixture is quantized symmetrically,
``w = (code - 2**(bits - 1)) * scale``, and codes with zeros cannot be kept.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from dist_peft.core.errors import UserError
from dist_peft.core.span import Span
from dist_peft.export.base_weights import BaseWeight
from dist_peft.export.formats.expert_layout import LLAMA4_LINEARS, ExpertLayout
from dist_peft.export.formats.export_spec import ExportResult, ExportSpec
from dist_peft.export.formats.groups import pack_code_words
from dist_peft.export.formats.integer_zero import (
    IntegerZeroExport,
    IntegerZeroPacker,
    pack_along_rows,
    quantize_integer_zeros,
)
from dist_peft.export.formats.two_layouts import make_compressed_settings
from dist_peft.export.merged_weights import MergedWeights, State
from dist_peft.export.model_directory import TensorPiece, WeightPacker, list_unpacked_linears
from dist_peft.export.verify_formats import TransformersConsumer
from dist_peft.quant.packed_rows import divide_exactly
from dist_peft.store.writer import TensorSpec

__all__ = [
    "CompressedTensorsExport",
    "CompressedTensorsPacker",
    "SymmetricTensorsPacker",
    "quantize_symmetrically",
]


class CompressedTensorsPacker(IntegerZeroPacker):
    """Pack linears as ``pack-quantized`` of compressed-tensors.

    Args:
        codec: bits and group size; quantizes merged rows.
        dtype: type of the stored scales.
    """

    symmetric = False

    def can_pack(self, weight: BaseWeight) -> bool:
        return self._fits_word_size(weight.num_columns)

    def plan_tensors(self, weight: BaseWeight) -> list[TensorSpec]:
        bits, out, groups = self.codec.bits, weight.num_rows, self._count_groups(weight)
        stem = weight.name_stem
        return [
            TensorSpec(
                f"{stem}.weight_packed", torch.int32, (out, weight.num_columns * bits // 32)
            ),
            TensorSpec(f"{stem}.weight_scale", self.dtype, (out, groups)),
            TensorSpec(f"{stem}.weight_zero_point", torch.int32, (-(-out * bits // 32), groups)),
            TensorSpec(f"{stem}.weight_shape", torch.int64, (2,)),
        ]

    def pack_rows(
        self, walk: MergedWeights, weight: BaseWeight, span: Span
    ) -> Iterable[TensorPiece]:
        bits, stem = self.codec.bits, weight.name_stem
        parts = quantize_integer_zeros(walk, weight, span, self.codec)
        words = pack_code_words(parts.codes, bits, torch.int32)
        yield TensorPiece(f"{stem}.weight_packed", words, span.start)
        yield TensorPiece(f"{stem}.weight_scale", parts.scale.to(self.dtype), span.start)
        zeros = pack_along_rows(parts.zero, bits)
        yield TensorPiece(f"{stem}.weight_zero_point", zeros, span.start * bits // 32)
        if span.start == 0:
            yield self.make_shape(weight)

    def make_shape(self, weight: BaseWeight) -> TensorPiece:
        """Return the tensor that holds the shape of a weight."""
        shape = torch.tensor([weight.num_rows, weight.num_columns])
        return TensorPiece(f"{weight.name_stem}.weight_shape", shape, 0)

    def make_config(self, walk: MergedWeights, unpacked: list[str]) -> Mapping[str, Any]:
        weights = {
            "num_bits": self.codec.bits,
            "type": "int",
            "symmetric": self.symmetric,
            "strategy": "group",
            "group_size": self.codec.group_size,
        }
        dense = list_unpacked_linears(walk, unpacked)
        return make_compressed_settings("pack-quantized", weights, dense)


class SymmetricTensorsPacker(CompressedTensorsPacker):
    """The same without zero points: merged rows, quantized by their largest magnitude, or the codes
    that were trained of a base that has no zero points either."""

    symmetric = True

    def plan_tensors(self, weight: BaseWeight) -> list[TensorSpec]:
        specs = super().plan_tensors(weight)
        return [spec for spec in specs if not spec.name.endswith(".weight_zero_point")]

    def pack_rows(
        self, walk: MergedWeights, weight: BaseWeight, span: Span
    ) -> Iterable[TensorPiece]:
        bits, stem = self.codec.bits, weight.name_stem
        if walk.state == "trained":
            parts = quantize_integer_zeros(walk, weight, span, self.codec)
            if not bool((parts.zero == 2 ** (bits - 1)).all()):
                raise UserError(
                    f"{weight.name} has zero points, with which transformers reads no experts of "
                    "compressed-tensors; use dist-peft merge"
                )
            codes, scale = parts.codes, parts.scale.to(self.dtype)
        else:
            rows = walk.read_merged_rows(weight, span)
            codes, scale = quantize_symmetrically(rows, bits, self.codec.group_size, self.dtype)
        words = pack_code_words(codes, bits, torch.int32)
        yield TensorPiece(f"{stem}.weight_packed", words, span.start)
        yield TensorPiece(f"{stem}.weight_scale", scale, span.start)
        if span.start == 0:
            yield self.make_shape(weight)


def quantize_symmetrically(
    rows: Tensor, bits: int, group_size: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Quantize rows ``[n, in]`` without zeros, rounded to nearest.

    ``w' = (code - 2**(bits - 1)) * scale`` with ``scale = 2 max |w| / (2**bits - 1)``, the scale of
    compressed-tensors' own observers, rounded to ``dtype`` before codes are chosen.

    Returns:
        Codes ``uint8 [n, in]`` and scales ``dtype [n, in / group_size]``.
    """
    middle = 2 ** (bits - 1)
    groups = rows.float().unflatten(1, (-1, group_size))
    scale = divide_exactly(groups.abs().amax(-1) * 2, 2**bits - 1).to(dtype)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    codes = (groups / scale.float().unsqueeze(-1)).round_().clamp_(-middle, middle - 1)
    return (codes + middle).to(torch.uint8).flatten(1), scale


class CompressedTensorsExport(IntegerZeroExport):
    """``pack-quantized`` of compressed-tensors."""

    name = "compressed-tensors"
    keeps = "the integer base unchanged; separate adapter"
    loads_with = "transformers with compressed-tensors"
    packer = CompressedTensorsPacker
    consumer = TransformersConsumer(
        needs=("compressed_tensors", "peft"),
        reports=("compressed-tensors",),
        quantization=("CompressedTensorsConfig", {"dequantize": True}),
    )

    joins_parts = True
    experts = ExpertLayout(
        linear_types=LLAMA4_LINEARS,
        dense_stacks=True,
        codes_limit="transformers reads experts of compressed-tensors without zero points, which "
        "an integer base has; --merge --lossy quantizes symmetrically, and mlx keeps codes",
    )

    def write_directory(
        self,
        job: ExportSpec,
        state: State,
        packer: WeightPacker,
        how: str,
        *,
        dtype: torch.dtype | None = None,
        exact: bool = False,
    ) -> ExportResult:
        if isinstance(packer, CompressedTensorsPacker):
            with job.open_weights(state) as walk:
                if state != "base" and any(weight.is_expert for weight in walk.weights):
                    packer = SymmetricTensorsPacker(packer.codec, packer.dtype)
        return super().write_directory(job, state, packer, how, dtype=dtype, exact=exact)
