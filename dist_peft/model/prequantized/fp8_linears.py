"""Linears stored in FP8 (E4M3), with scales for tiles, rows or whole tensors (``quant.fp8``).

Of a linear ``STEM``, ``weight`` float8_e4m3fn ``[out, in]``::

    fp8 (DeepSeek-V3, Qwen, MiniMax)
           weight_scale_inv  [ceil(out / 128), ceil(in / 128)]   a scale for each tile
                             [] or [1]                           one a tensor
    compressed-tensors, float-quantized
           weight_scale      [out, 1]                            strategy channel
                             [1]                                 strategy tensor
                             [ceil(out / 128), ceil(in / 128)]   strategy block

``w = code * scale`` in all of them (``weight_scale_inv`` is the inverse of the quantizer's factor,
that is the scale). A row has copies of the scales of its tiles, wherever ranks cut. Scales may be
float32, 16-bit floats, or powers of two in a byte (UE8M0).

Runtimes for these files also round activations to FP8. Here products have the activations as they
are, as with ``dequantize=True`` in ``transformers``: settings and scales of activations are not
used.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

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
    read_only_group,
    refuse_extras,
    require_tensor,
)
from dist_peft.quant.fp8 import Fp8Codec
from dist_peft.store.index import SafetensorsIndex
from dist_peft.store.reader import RowReader

__all__ = ["CompressedFp8Format", "TiledFp8Format"]

_ROW_GROUP = 2**16
"""``group_size`` of rows with one scale."""

_SCALES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e8m0fnu,
    torch.uint8,
)


@dataclass(frozen=True)
class _Fp8Linear(PackedLinear):
    codec: Fp8Codec
    scale: str
    """Name of the tensor with the scales."""
    tile_rows: int
    """Rows that share a row of scales; 0: one scale a tensor."""

    def _read_packed(self, reader: RowReader, span: Span) -> Tensor:
        codes = reader.read_rows(f"{self.stem}.weight", span)
        groups = self.codec.count_groups(self.in_features)
        if self.tile_rows:
            first = span.start // self.tile_rows
            tiles = Span(first, -(-span.stop // self.tile_rows))
            read = _to_float(reader.read_rows(self.scale, tiles)).view(len(tiles), -1)
            rows = torch.arange(span.start, span.stop) // self.tile_rows - first
            scale = read[rows].expand(len(span), groups)
        else:
            scale = _to_float(reader.read_rows(self.scale)).view(1, 1).expand(len(span), groups)
        return self.codec.join_packed_rows(codes, scale)


def _to_float(scale: Tensor) -> Tensor:
    """Scales in float32, exactly; the byte 255 of UE8M0 is NaN."""
    return scale.view(torch.float8_e8m0fnu).float() if scale.dtype == torch.uint8 else scale.float()


@dataclass(frozen=True)
class _Fp8Format(PackedFormat):
    """FP8 of either kind.

    Attributes:
        tile: rows and columns that share a scale; None: a row or a tensor does.
        per_row: a row has a scale of its own.
    """

    tile: tuple[int, int] | None = field(default=None)
    per_row: bool = False

    @property
    def scale_tile(self) -> tuple[int, int] | None:
        """Rows and columns that share a scale."""
        return self.tile

    def open_linear(
        self, index: SafetensorsIndex, stem: str, out_features: int, in_features: int
    ) -> PackedLinear:
        require_tensor(index, f"{stem}.weight", (out_features, in_features), (torch.float8_e4m3fn,))
        name = f"{stem}{self.MARK}"
        if self.tile is not None:
            rows, columns = self.tile
            shape: tuple[int, ...] = (-(-out_features // rows), -(-in_features // columns))
        elif self.per_row:
            rows, shape = 1, (out_features, 1)
        else:
            rows, shape = 0, index.find_tensor(name).shape
            shape = shape if set(shape) <= {1} else (1,)
        require_tensor(index, name, shape, _SCALES)
        codec = Fp8Codec(self.quant.group_size)
        return _Fp8Linear(stem, out_features, in_features, codec, name, rows)


@dataclass(frozen=True)
class TiledFp8Format(_Fp8Format):
    """FP8 as DeepSeek-V3 and Qwen are published: a scale for each tile of weights."""

    MARK: ClassVar[str] = ".weight_scale_inv"
    OTHERS: ClassVar[tuple[str, ...]] = (".weight", ".activation_scale", ".input_scale")

    @classmethod
    def from_settings(cls, settings: Settings, index: SafetensorsIndex) -> Self:
        tile = _read_tile(settings.get("weight_block_size"), "weight_block_size", index)
        return cls("fp8", _quant_of(tile), tile=tile)


@dataclass(frozen=True)
class CompressedFp8Format(_Fp8Format):
    """compressed-tensors' ``float-quantized`` in 8 bits: a scale for each row, tensor or tile."""

    MARK: ClassVar[str] = ".weight_scale"
    OTHERS: ClassVar[tuple[str, ...]] = (
        ".weight",
        ".input_scale",
        ".output_scale",
        ".weight_shape",
    )

    @classmethod
    def from_settings(cls, settings: Settings, index: SafetensorsIndex) -> Self:
        group = read_only_group(settings, index)
        weights = group.get("weights")
        known: Settings = weights if isinstance(weights, dict) else {}
        if known.get("type") != "float" or known.get("num_bits") != 8:
            raise UserError(
                f"{index.path} is float-quantized with {known.get('num_bits')} bits of type "
                f"{known.get('type')!r}; 8 bits of type float are read: {UNQUANTIZED_HINT}"
            )
        if known.get("symmetric", True) is not True:
            raise UserError(f"{index.path} is FP8 with zero points; {UNQUANTIZED_HINT}")
        refuse_extras(settings, group, known, index, activations=True)
        strategy = known.get("strategy") or "tensor"
        tile = None
        if strategy == "block":
            tile = _read_tile(known.get("block_structure"), "block_structure", index)
        elif strategy not in ("channel", "tensor"):
            raise UserError(
                f"{index.path} has one scale a {strategy}; strategies channel, tensor and block "
                f"are read: {UNQUANTIZED_HINT}"
            )
        label = "compressed-tensors float-quantized"
        return cls(label, _quant_of(tile), tile=tile, per_row=strategy == "channel")


def _quant_of(tile: tuple[int, int] | None) -> QuantConfig:
    kind: Literal["fp8"] = "fp8"
    return QuantConfig(kind=kind, group_size=_ROW_GROUP if tile is None else tile[1])


def _read_tile(value: Any, key: str, index: SafetensorsIndex) -> tuple[int, int] | None:
    """Return rows and columns of a tile; None: there are none."""
    if value is None:
        return None
    whole = isinstance(value, list | tuple) and len(value) == 2
    if not whole or not all(type(size) is int and size > 0 for size in value) or value[1] % 8:
        raise UserError(
            f"{index.path} has {key} {value!r} in its quantization_config; two positive numbers "
            f"are read, the second a multiple of 8: {UNQUANTIZED_HINT}"
        )
    return int(value[0]), int(value[1])
