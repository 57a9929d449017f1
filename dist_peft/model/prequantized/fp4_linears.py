"""Linears stored by compressed-tensors in 4-bit floats, NVFP4 and MXFP4 (``quant.nvfp4``,
``quant.mxfp4``).

Of a linear ``STEM`` ``[out, in]``::

    weight_packed        uint8 [out, in / 2]          two codes a byte, the even one low
    weight_scale         float8_e4m3fn [out, in / 16] of NVFP4
                         uint8 [out, in / 32]         of MXFP4: exponents, 127 added
    weight_global_scale  float32 [1]                  of NVFP4: the divisor of all scales

Rounding of activations (``input_activations``, ``input_global_scale``) is left out, as for FP8.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from dist_peft.core.config.run import QuantConfig
from dist_peft.core.errors import UserError
from dist_peft.core.span import Span
from dist_peft.model.prequantized.linear import (
    UNQUANTIZED_HINT,
    PackedFormat,
    PackedLinear,
    Settings,
    count_whole_groups,
    read_only_group,
    refuse_extras,
    require_tensor,
)
from dist_peft.quant.mxfp4 import MXFP4_GROUP, Mxfp4Codec
from dist_peft.quant.nvfp4 import NVFP4_GROUP, Nvfp4Codec
from dist_peft.quant.packed_rows import view_as_bytes
from dist_peft.store.index import SafetensorsIndex
from dist_peft.store.reader import RowReader

__all__ = ["CompressedMxfp4Format", "Nvfp4Format"]


@dataclass(frozen=True)
class _Mxfp4Linear(PackedLinear):
    def _read_packed(self, reader: RowReader, span: Span) -> Tensor:
        payload = reader.read_rows(f"{self.stem}.weight_packed", span)
        scales = reader.read_rows(f"{self.stem}.weight_scale", span).view(torch.uint8)
        return torch.cat((payload, scales, scales.new_zeros(len(span), -scales.shape[1] % 4)), 1)


@dataclass(frozen=True)
class _Nvfp4Linear(_Mxfp4Linear):
    def _read_packed(self, reader: RowReader, span: Span) -> Tensor:
        factor = reader.read_rows(f"{self.stem}.weight_global_scale").expand(len(span), 1)
        return torch.cat((super()._read_packed(reader, span), view_as_bytes(factor)), 1)


@dataclass(frozen=True)
class _Fp4Format(PackedFormat):
    MARK: ClassVar[str] = ".weight_packed"
    OTHERS: ClassVar[tuple[str, ...]] = (
        ".weight_scale",
        ".weight_global_scale",
        ".input_global_scale",
    )

    KIND: ClassVar[Literal["mxfp4", "nvfp4"]]
    GROUP: ClassVar[int]

    @classmethod
    def from_settings(cls, settings: Settings, index: SafetensorsIndex) -> Self:
        group = read_only_group(settings, index)
        weights = group.get("weights")
        known: Settings = weights if isinstance(weights, dict) else {}
        found = {key: known.get(key) for key in ("type", "num_bits", "group_size")}
        wanted = {"type": "float", "num_bits": 4, "group_size": cls.GROUP}
        label = f"{cls.KIND}-pack-quantized"
        if found != wanted or known.get("symmetric", True) is not True:
            raise UserError(
                f"{index.path} is {label} with {found}; {wanted} without zero points is read: "
                f"{UNQUANTIZED_HINT}"
            )
        refuse_extras(settings, group, known, index, activations=True)
        return cls(f"compressed-tensors {label}", QuantConfig(kind=cls.KIND))

    def open_linear(
        self, index: SafetensorsIndex, stem: str, out_features: int, in_features: int
    ) -> PackedLinear:
        groups = count_whole_groups(stem, in_features, self.GROUP)
        packed = (out_features, in_features // 2)
        require_tensor(index, f"{stem}.weight_packed", packed, (torch.uint8,))
        return self._open_scales(index, stem, (out_features, groups), in_features)

    def _open_scales(
        self, index: SafetensorsIndex, stem: str, scales: tuple[int, int], in_features: int
    ) -> PackedLinear:
        dtypes = (torch.uint8, torch.float8_e8m0fnu)
        require_tensor(index, f"{stem}.weight_scale", scales, dtypes)
        return _Mxfp4Linear(stem, scales[0], in_features, Mxfp4Codec())


@dataclass(frozen=True)
class CompressedMxfp4Format(_Fp4Format):
    """compressed-tensors' ``mxfp4-pack-quantized``."""

    KIND: ClassVar[Literal["mxfp4", "nvfp4"]] = "mxfp4"
    GROUP: ClassVar[int] = MXFP4_GROUP


@dataclass(frozen=True)
class Nvfp4Format(_Fp4Format):
    """compressed-tensors' ``nvfp4-pack-quantized``."""

    KIND: ClassVar[Literal["mxfp4", "nvfp4"]] = "nvfp4"
    GROUP: ClassVar[int] = NVFP4_GROUP

    def _open_scales(
        self, index: SafetensorsIndex, stem: str, scales: tuple[int, int], in_features: int
    ) -> PackedLinear:
        require_tensor(index, f"{stem}.weight_scale", scales, (torch.float8_e4m3fn,))
        require_tensor(index, f"{stem}.weight_global_scale", (1,), (torch.float32,))
        return _Nvfp4Linear(stem, scales[0], in_features, Nvfp4Codec())
