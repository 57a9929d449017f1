"""``mxfp4``: weights in MXFP4, E2M1 numbers with a power of two for each 32 (``quant.mxfp4``).

Two layouts hold the same codes and exponents, by the model:

    gpt-oss, quant_method mxfp4: experts alone, whose parameter NAME is [E, in, out] unquantized
           NAME_blocks    uint8 [E, out, in / 32, 16]   two codes a byte, the even one low
           NAME_scales    uint8 [E, out, in / 32]       exponents, 127 added
    other models: compressed-tensors, format mxfp4-pack-quantized, linears, experts as
           ``expert_layout`` has them
           weight_packed  uint8 [out, in / 2]
           weight_scale   uint8 [out, in / 32]

Rows of ``quant.mxfp4`` have these bytes next to each other, so that codes trained through the
quantizer, and those of weights that an adapter does not change, are copied.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dist_peft.adapters.export_limits import ExportContent
from dist_peft.core.errors import UserError
from dist_peft.core.span import Span
from dist_peft.export.base_weights import BaseWeight
from dist_peft.export.formats.expert_layout import LLAMA4_LINEARS, ExpertLayout
from dist_peft.export.formats.export_format import PlannedExport
from dist_peft.export.formats.export_spec import ExportResult, ExportSpec
from dist_peft.export.formats.two_layouts import (
    COMPRESSED_TENSORS,
    TwoLayoutsExport,
    make_compressed_settings,
)
from dist_peft.export.merged_weights import MergedWeights
from dist_peft.export.model_directory import TensorPiece, list_unpacked_linears
from dist_peft.export.verify_formats import Consumer, TransformersConsumer
from dist_peft.model.experts import ExpertStack
from dist_peft.quant.codec import make_codec
from dist_peft.quant.mxfp4 import MXFP4_GROUP, Mxfp4Codec
from dist_peft.store.writer import TensorSpec

__all__ = ["CompressedMxfp4Packer", "Mxfp4Export", "Mxfp4StackPacker"]

_CODEC = Mxfp4Codec()


def _read_mxfp4_rows(walk: MergedWeights, weight: BaseWeight, span: Span) -> Tensor:
    """Return rows of the weight's linear in MXFP4, ``uint8 [n, row_bytes]``: those of training
    where they are kept, else merged rows, encoded."""
    codec = weight.codec
    if walk.keeps_codes(weight) and codec is not None and codec.mxfp4_rows is not None:
        return walk.read_packed_rows(weight, span)
    rows = walk.read_merged_rows(weight, span)
    if weight.is_transposed:
        rows = rows.transpose(1, 2)
    return _CODEC.quantize_to_packed(rows.reshape(-1, weight.num_columns).float())


class CompressedMxfp4Packer:
    """Pack weights as ``mxfp4-pack-quantized`` of compressed-tensors."""

    row_multiple = 1

    def can_pack(self, weight: BaseWeight) -> bool:
        return weight.num_columns % MXFP4_GROUP == 0

    def plan_tensors(self, weight: BaseWeight) -> list[TensorSpec]:
        out, columns, stem = weight.num_rows, weight.num_columns, weight.name_stem
        return [
            TensorSpec(f"{stem}.weight_packed", torch.uint8, (out, columns // 2)),
            TensorSpec(f"{stem}.weight_scale", torch.uint8, (out, columns // MXFP4_GROUP)),
        ]

    def pack_rows(
        self, walk: MergedWeights, weight: BaseWeight, span: Span
    ) -> Iterable[TensorPiece]:
        codes, exponents = _CODEC.split_packed_rows(
            _read_mxfp4_rows(walk, weight, span), weight.num_columns
        )
        yield TensorPiece(f"{weight.name_stem}.weight_packed", codes, span.start)
        yield TensorPiece(f"{weight.name_stem}.weight_scale", exponents, span.start)

    def make_config(self, walk: MergedWeights, unpacked: list[str]) -> Mapping[str, Any]:
        weights = {
            "num_bits": 4,
            "type": "float",
            "symmetric": True,
            "strategy": "group",
            "group_size": MXFP4_GROUP,
            "scale_dtype": "torch.uint8",
        }
        return make_compressed_settings(
            "mxfp4-pack-quantized", weights, list_unpacked_linears(walk, unpacked)
        )


class Mxfp4StackPacker:
    """Pack the experts of gpt-oss, as it is published; linears stay dense."""

    row_multiple = 1

    def can_pack(self, weight: BaseWeight) -> bool:
        return weight.is_expert and weight.num_columns % MXFP4_GROUP == 0

    def plan_tensors(self, weight: BaseWeight) -> list[TensorSpec]:
        stack, groups = weight.linear, weight.num_columns // MXFP4_GROUP
        assert isinstance(stack, ExpertStack)
        shape = (stack.experts, stack.out_features, groups)
        return [
            TensorSpec(f"{weight.written}_blocks", torch.uint8, (*shape, MXFP4_GROUP // 2)),
            TensorSpec(f"{weight.written}_scales", torch.uint8, shape),
        ]

    def pack_rows(
        self, walk: MergedWeights, weight: BaseWeight, span: Span
    ) -> Iterable[TensorPiece]:
        codes, exponents = _CODEC.split_packed_rows(
            _read_mxfp4_rows(walk, weight, span), weight.num_columns
        )
        experts, groups = len(span), weight.num_columns // MXFP4_GROUP
        blocks = codes.reshape(experts, -1, groups, MXFP4_GROUP // 2)
        yield TensorPiece(f"{weight.written}_blocks", blocks, span.start)
        yield TensorPiece(
            f"{weight.written}_scales", exponents.reshape(experts, -1, groups), span.start
        )

    def make_config(self, walk: MergedWeights, unpacked: list[str]) -> Mapping[str, Any]:
        dense = ["model.layers.*.self_attn", "model.layers.*.mlp.router"]
        how = {
            "quant_method": "mxfp4",
            "modules_to_not_convert": [*dense, "model.embed_tokens", "lm_head"],
        }
        return {"quantization_config": how}


_GPT_OSS = TransformersConsumer(
    needs=("accelerate",), quantization=("Mxfp4Config", {"dequantize": True})
)


class Mxfp4Export(TwoLayoutsExport):
    """MXFP4, as gpt-oss is published or as compressed-tensors has it."""

    name = "mxfp4"
    keeps = "merged, rounded to MXFP4; codes of MXFP4 that are not adapted or were trained"
    loads_with = "transformers with compressed-tensors"
    joins_parts = True
    experts = ExpertLayout(linear_types=LLAMA4_LINEARS, dense_stacks=True)
    by_method: ClassVar[Mapping[str, Consumer]] = {
        "mxfp4": _GPT_OSS,
        "compressed-tensors": COMPRESSED_TENSORS,
    }

    def choose_experts(self, model: nn.Module, options: Mapping[str, Any]) -> ExpertLayout:
        """Return the form: stacks of gpt-oss, whose linears stay dense."""
        return replace(self.experts, stacked=_is_gpt_oss(model))

    def get_content(self, options: Mapping[str, Any]) -> ExportContent:
        """Return ``merged``."""
        return "merged"

    def find_packing_obstacle(self, run: PlannedExport, options: Mapping[str, Any]) -> str | None:
        if run.limits.trained_codes and run.codec.mxfp4_rows is None:
            return "the codes that are trained are not of base.quant.kind mxfp4"
        return None

    def write_export(self, job: ExportSpec) -> ExportResult:
        trained = job.trained_codes
        codec = make_codec(job.base.quant, job.compute_dtype)
        if trained and codec.mxfp4_rows is None:
            raise UserError(
                "mxfp4 keeps codes of base.quant.kind mxfp4, and this run trained others through "
                "the quantizer: choose the format of the base's kind, or hf-bf16"
            )
        state = "trained" if trained else job.rows_state
        job.check_output()
        with job.open_weights(state) as walk:
            as_gpt_oss = _is_gpt_oss(walk.skeleton.model)
        packer = Mxfp4StackPacker() if as_gpt_oss else CompressedMxfp4Packer()
        layout = "experts as gpt-oss has them" if as_gpt_oss else "mxfp4-pack-quantized"
        how = f"{'the trained codes' if trained else 'merged, rounded to nearest'}: {layout}"
        return self.write_directory(job, state, packer, how, exact=trained)


def _is_gpt_oss(model: Any) -> bool:
    """Return whether ``transformers`` reads ``quant_method: mxfp4`` for this model."""
    return bool(model.config.get_text_config().model_type == "gpt_oss")
