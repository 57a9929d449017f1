"""``bnb-fp4``, ``bnb-int8``: the other formats of bitsandbytes (``quant.fp4``, ``quant.llm_int8``).

    bnb-fp4    weight              uint8 [out * in / 2, 1]   even element in the high nibble
               weight.absmax       float32 [out * in / 64]   scale of each block, along rows
               weight.quant_map    float32 [16]              the levels
               weight.quant_state.bitsandbytes__fp4          JSON as uint8
    bnb-int8   weight              int8 [out, in]
               SCB                 float32 [out]             the row's largest magnitude
               weight_format       uint8 []                  0: row-major

Codes that were trained through the quantizer, and those of a base in the format that an adapter
does not change, are copied; other rows are rounded to nearest. Blocks of FP4 run over the flattened
weight: a linear whose ``in_features`` 64 does not divide stays dense. Scales are not nested.

bitsandbytes has no experts, which stay dense. Its LLM.int8 also rounds activations; the comparison
computes with the stored weights, as training does.
"""

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from dist_peft.adapters.export_limits import ExportContent
from dist_peft.core.errors import UserError
from dist_peft.core.span import Span
from dist_peft.export.base_weights import BaseWeight
from dist_peft.export.formats.bnb_packer import (
    encode_quant_state,
    make_bnb_settings,
    make_quant_state_name,
)
from dist_peft.export.formats.expert_layout import LLAMA4_LINEARS, ExpertLayout
from dist_peft.export.formats.export_format import PackedExport, PlannedExport
from dist_peft.export.formats.export_spec import ExportResult, ExportSpec
from dist_peft.export.merged_weights import MergedWeights
from dist_peft.export.model_directory import TensorPiece, list_unpacked_linears
from dist_peft.export.verify import Comparison
from dist_peft.export.verify_bitsandbytes import (
    dequantize_int8_linears,
    verify_with_bitsandbytes,
)
from dist_peft.export.verify_formats import Consumer, ConsumerRequest, TransformersConsumer
from dist_peft.quant.codec import Codec, make_codec
from dist_peft.quant.fp4 import FP4_LEVELS, Fp4Codec
from dist_peft.quant.llm_int8 import LlmInt8Codec
from dist_peft.store.writer import TensorSpec

__all__ = ["BnbFp4Export", "BnbFp4Packer", "BnbInt8Export", "BnbInt8Packer"]

_BLOCK = 64
_FP4, _INT8 = Fp4Codec(_BLOCK), LlmInt8Codec()


class BnbFp4Packer:
    """Pack linears in bitsandbytes' FP4.

    Args:
        dtype: type that bitsandbytes dequantizes to and computes in.
    """

    kind: ClassVar[str] = "fp4"
    row_multiple = 1

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def can_pack(self, weight: BaseWeight) -> bool:
        """Return whether blocks end with rows."""
        return weight.num_columns % _BLOCK == 0

    def plan_tensors(self, weight: BaseWeight) -> list[TensorSpec]:
        elements, name = weight.num_rows * weight.num_columns, weight.written
        state = self._encode_state(weight)
        return [
            TensorSpec(name, torch.uint8, (elements // 2, 1)),
            TensorSpec(f"{name}.absmax", torch.float32, (elements // _BLOCK,)),
            TensorSpec(f"{name}.quant_map", torch.float32, (len(FP4_LEVELS),)),
            TensorSpec(make_quant_state_name(weight, self.kind), torch.uint8, (len(state),)),
        ]

    def pack_rows(
        self, walk: MergedWeights, weight: BaseWeight, span: Span
    ) -> Iterable[TensorPiece]:
        rows = None if weight.codec is None else weight.codec.fp4_rows
        codec = _FP4 if rows is None or rows.group_size % _BLOCK else rows
        packed = _read_packed_rows(walk, weight, span, self.dtype, _FP4, keeps=codec is rows)
        payload, scales = codec.split_packed_rows(packed, weight.num_columns)
        block = torch.arange(weight.num_columns // _BLOCK) * _BLOCK // codec.group_size
        codes = payload[:, : weight.num_columns // 2].reshape(-1, 1)
        first = span.start * weight.num_columns
        yield TensorPiece(weight.written, codes, first // 2)
        yield TensorPiece(f"{weight.written}.absmax", scales[:, block].flatten(), first // _BLOCK)
        if span.stop == weight.num_rows:
            yield TensorPiece(f"{weight.written}.quant_map", torch.tensor(FP4_LEVELS), 0)
            name = make_quant_state_name(weight, self.kind)
            yield TensorPiece(name, self._encode_state(weight), 0)

    def _encode_state(self, weight: BaseWeight) -> Tensor:
        return encode_quant_state(weight, _BLOCK, self.dtype, kind=self.kind)

    def make_config(self, walk: MergedWeights, unpacked: list[str]) -> Mapping[str, Any]:
        return make_bnb_settings(
            walk, unpacked, double_quant=False, dtype=self.dtype, kind=self.kind
        )


class BnbInt8Packer:
    """Pack linears as LLM.int8.

    Args:
        dtype: type that bitsandbytes computes in.
    """

    row_multiple = 1

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def can_pack(self, weight: BaseWeight) -> bool:
        """Return whether it has numbers to pack, as any linear."""
        return weight.num_columns > 0

    def plan_tensors(self, weight: BaseWeight) -> list[TensorSpec]:
        stem, shape = weight.name_stem, (weight.num_rows, weight.num_columns)
        return [
            TensorSpec(weight.written, torch.int8, shape),
            TensorSpec(f"{stem}.SCB", torch.float32, (weight.num_rows,)),
            TensorSpec(f"{stem}.weight_format", torch.uint8, ()),
        ]

    def pack_rows(
        self, walk: MergedWeights, weight: BaseWeight, span: Span
    ) -> Iterable[TensorPiece]:
        rows = None if weight.codec is None else weight.codec.int8_rows
        packed = _read_packed_rows(walk, weight, span, self.dtype, _INT8, keeps=rows is not None)
        codes, absmax = _INT8.split_packed_rows(packed, weight.num_columns)
        yield TensorPiece(weight.written, codes, span.start)
        yield TensorPiece(f"{weight.name_stem}.SCB", absmax, span.start)
        if span.stop == weight.num_rows:
            stored = torch.zeros((), dtype=torch.uint8)
            yield TensorPiece(f"{weight.name_stem}.weight_format", stored, 0)

    def make_config(self, walk: MergedWeights, unpacked: list[str]) -> Mapping[str, Any]:
        how = {
            "quant_method": "bitsandbytes",
            "load_in_4bit": False,
            "load_in_8bit": True,
            "llm_int8_skip_modules": list_unpacked_linears(walk, unpacked),
        }
        return {"quantization_config": how}


def _read_packed_rows(
    walk: MergedWeights,
    weight: BaseWeight,
    span: Span,
    dtype: torch.dtype,
    codec: Codec,
    *,
    keeps: bool,
) -> Tensor:
    """Return rows of training where ``keeps`` and they are kept, or merged ones in ``codec``."""
    if keeps and walk.keeps_codes(weight):
        return walk.read_packed_rows(weight, span)
    return codec.quantize_to_packed(walk.read_merged_rows(weight, span).to(dtype).float())


class _BnbExport(PackedExport):
    """Merged weights in the format, or the codes that were trained."""

    loads_with = "transformers with bitsandbytes"
    experts = ExpertLayout(packed=False, linear_types=LLAMA4_LINEARS)
    kind: ClassVar[str]
    packer: ClassVar[type[BnbFp4Packer] | type[BnbInt8Packer]]

    def get_content(self, options: Mapping[str, Any]) -> ExportContent:
        """Return ``merged``."""
        return "merged"

    @abstractmethod
    def _has_codes(self, codec: Codec) -> bool:
        """Return whether rows of a codec have the format's codes."""

    def find_packing_obstacle(self, run: PlannedExport, options: Mapping[str, Any]) -> str | None:
        if run.limits.trained_codes and not self._has_codes(run.codec):
            return f"the codes that are trained are not of base.quant.kind {self.kind}"
        return None

    def write_export(self, job: ExportSpec) -> ExportResult:
        packer = self.packer(job.compute_dtype)
        if not job.trained_codes:
            how = "merged, rounded to nearest"
            return self.write_directory(job, job.rows_state, packer, how)
        if not self._has_codes(make_codec(job.base.quant, job.compute_dtype)):
            raise UserError(
                f"{self.name} keeps codes of base.quant.kind {self.kind}, and this run trained "
                "others through the quantizer: choose the format of the base's kind, or hf-bf16"
            )
        return self.write_directory(job, "trained", packer, "the trained codes", exact=True)


class BnbFp4Export(_BnbExport):
    """bitsandbytes' FP4."""

    name = "bnb-fp4"
    keeps = "merged, rounded to FP4; codes that were trained through the quantizer"
    kind = "fp4"
    packer = BnbFp4Packer

    def _has_codes(self, codec: Codec) -> bool:
        return codec.fp4_rows is not None

    @property
    def consumers(self) -> tuple[Consumer, ...]:
        return (TransformersConsumer(needs=("bitsandbytes",)),)

    def verify_export(self, job: ExportSpec, request: ConsumerRequest) -> tuple[str, Comparison]:
        return verify_with_bitsandbytes(request)


class BnbInt8Export(_BnbExport):
    """bitsandbytes' LLM.int8."""

    name = "bnb-int8"
    keeps = "merged, rounded to LLM.int8; codes that were trained through the quantizer"
    kind = "llm_int8"
    packer = BnbInt8Packer
    consumer = TransformersConsumer(
        needs=("bitsandbytes", "accelerate"),
        reports=("bitsandbytes",),
        settings={"device_map": "cpu"},
        prepare=dequantize_int8_linears,
        generates=False,
    )

    def _has_codes(self, codec: Codec) -> bool:
        return codec.int8_rows is not None
