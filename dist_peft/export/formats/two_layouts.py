"""A format with two layouts, each of which a class of ``transformers`` reads."""

from collections.abc import Mapping
from typing import Any, ClassVar

from dist_peft.export.formats.export_format import PackedExport
from dist_peft.export.formats.export_spec import ExportSpec
from dist_peft.export.verify import Comparison, compare_logits
from dist_peft.export.verify_formats import Consumer, ConsumerRequest, TransformersConsumer
from dist_peft.model.hub import read_json_object

__all__ = ["COMPRESSED_TENSORS", "TwoLayoutsExport", "make_compressed_settings"]

COMPRESSED_TENSORS = TransformersConsumer(
    needs=("compressed_tensors",),
    reports=("compressed-tensors",),
    quantization=("CompressedTensorsConfig", {"dequantize": True}),
)


def make_compressed_settings(
    layout: str, weights: Mapping[str, Any], dense: list[str]
) -> dict[str, Any]:
    """Return what ``config.json`` says of linears that compressed-tensors reads.

    Args:
        layout: its name of the layout, such as ``pack-quantized``.
        weights: its arguments of the weights' quantization.
        dense: paths of linears that are not packed.
    """
    how = {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": dense,
    }
    return {"quantization_config": how}


class TwoLayoutsExport(PackedExport):
    """A packed format whose output names its layout as ``quant_method`` in ``config.json``."""

    by_method: ClassVar[Mapping[str, Consumer]]
    """``quant_method`` -> the consumer."""

    @property
    def consumers(self) -> tuple[Consumer, ...]:
        return tuple(self.by_method.values())

    def verify_export(self, job: ExportSpec, request: ConsumerRequest) -> tuple[str, Comparison]:
        how = read_json_object(request.path / "config.json")["quantization_config"]
        consumer, logits = self.by_method[how["quant_method"]].compute_logits(request)
        return consumer, compare_logits(logits, request.probe)
