"""Linears stored by bitsandbytes in NF4, FP4 and LLM.int8 (see also ``quant.import_formats`` and
``export.formats.bnb_packer``).

Blocks of 64 weights run along the flattened weight, so that one may cross from a row into the next
where 64 does not divide ``in``. Our rows are self-contained: their groups are the largest that
divide a row and a block, and those inside one block repeat its scale. Scales that are themselves in
8 bits are converted to float32, so that dequantization equals that of bitsandbytes bit for bit.

LLM.int8 has a byte a weight and a float32 a row::

    STEM.weight         int8 [out, in]
    STEM.SCB            float32 [out]     the row's largest magnitude
    STEM.weight_format  uint8 []          0: row-major
"""

import json
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Self

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
    require_tensor,
)
from dist_peft.quant.fp4 import FP4_LEVELS, Fp4Codec
from dist_peft.quant.import_formats import convert_bnb_rows, dequantize_absmax
from dist_peft.quant.llm_int8 import LlmInt8Codec
from dist_peft.quant.nf4 import NF4_LEVELS, Nf4Codec
from dist_peft.quant.packed_rows import align_to_4_bytes, view_as_bytes
from dist_peft.store.index import SafetensorsIndex
from dist_peft.store.reader import RowReader

__all__ = ["BitsandbytesFormat", "LlmInt8Format"]

BLOCK, NESTED_BLOCK = 64, 256
_STORAGE = (torch.uint8, torch.int8, torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class _BnbLinear(PackedLinear):
    codec: Nf4Codec | Fp4Codec
    nested: bool

    def _read_packed(self, reader: RowReader, span: Span) -> Tensor:
        name, size = (
            f"{self.stem}.weight",
            reader.index.find_tensor(f"{self.stem}.weight").row_bytes,
        )
        offset = self._read_absmax_offset(reader)
        row = self.in_features // 2 // size  # elements of the stored type; exact, see `linear`
        payload = reader.read_rows(name, Span(span.start * row, span.stop * row)).view(torch.uint8)
        first = span.start * self.in_features // BLOCK
        blocks = Span(first, -(-span.stop * self.in_features // BLOCK))
        group = self.codec.group_size
        starts = torch.arange(span.start * self.in_features, span.stop * self.in_features, group)
        absmax = self._read_absmax(reader, blocks, offset)[starts // BLOCK - first]
        return convert_bnb_rows(
            payload.flatten(), absmax.view(len(span), -1), self.codec, self.in_features
        )

    def _read_absmax(self, reader: RowReader, blocks: Span, offset: float) -> Tensor:
        name = f"{self.stem}.weight"
        absmax = reader.read_rows(f"{name}.absmax", blocks)
        if not self.nested:
            return absmax
        runs = Span(blocks.start // NESTED_BLOCK, -(-blocks.stop // NESTED_BLOCK))
        return dequantize_absmax(
            absmax,
            blocks.start - runs.start * NESTED_BLOCK,
            reader.read_rows(f"{name}.nested_absmax", runs),
            reader.read_rows(f"{name}.nested_quant_map"),
            offset,
            NESTED_BLOCK,
        )

    def _read_absmax_offset(self, reader: RowReader) -> float:
        """Return the offset that double quantization subtracted; 0 without it.

        Raises:
            ValueError: the state contradicts the tensors' shapes.
        """
        name = f"{self.stem}.weight"
        kind = self.codec.name
        text = bytes(reader.read_rows(f"{name}.quant_state.bitsandbytes__{kind}").tolist())
        try:
            state = json.loads(text)
        except ValueError as error:
            raise ValueError(f"its quant_state is damaged: {error}") from None
        wanted: dict[str, Any] = {
            "quant_type": kind,
            "blocksize": BLOCK,
            "shape": [self.out_features, self.in_features],
        }
        if self.nested:
            wanted["nested_blocksize"] = NESTED_BLOCK
        for key, value in wanted.items():
            if state.get(key) != value:
                raise ValueError(f"its quant_state has {key} {state.get(key)}, not {value}")
        levels = reader.read_rows(f"{name}.quant_map")
        known = NF4_LEVELS if kind == "nf4" else FP4_LEVELS
        if not torch.equal(levels, torch.tensor(known)):
            raise ValueError(f"its quant_map has other levels than {kind.upper()}")
        return float(state["nested_offset"]) if self.nested else 0.0


@dataclass(frozen=True)
class BitsandbytesFormat(PackedFormat):
    """bitsandbytes NF4 and FP4, with and without double quantization."""

    MARK: ClassVar[str] = ".weight.absmax"
    OTHERS: ClassVar[tuple[str, ...]] = (
        ".weight",
        ".weight.quant_map",
        ".weight.nested_absmax",
        ".weight.nested_quant_map",
        ".weight.quant_state.bitsandbytes__nf4",
        ".weight.quant_state.bitsandbytes__fp4",
    )

    nested: bool = False

    @classmethod
    def from_settings(cls, settings: Settings, index: SafetensorsIndex) -> Self:
        kind = settings.get("bnb_4bit_quant_type", "fp4")
        if kind not in ("nf4", "fp4"):
            raise UserError(
                f"{index.path} is bitsandbytes {kind}; nf4 and fp4 are read: {UNQUANTIZED_HINT}"
            )
        double = bool(settings.get("bnb_4bit_use_double_quant", False))
        if kind == "fp4":
            quant = QuantConfig(kind="fp4", group_size=BLOCK)
        else:
            quant = QuantConfig(kind="nf4", group_size=BLOCK, double_quant=double)
        return cls("bitsandbytes", quant, nested=double)

    def open_linear(
        self, index: SafetensorsIndex, stem: str, out_features: int, in_features: int
    ) -> PackedLinear:
        name, elements = f"{stem}.weight", out_features * in_features
        group = math.gcd(in_features, BLOCK)
        if group % 8:
            raise UserError(
                f"{stem} has {in_features} in_features, no multiple of 8; {UNQUANTIZED_HINT}"
            )
        stored = index.find_tensor(name).dtype
        require_tensor(index, name, (elements // 2 // max(1, stored.itemsize), 1), _STORAGE)
        nested, kind = self.nested, self.quant.kind
        blocks = -(-elements // BLOCK)
        scales = torch.uint8 if nested else torch.float32
        require_tensor(index, f"{name}.absmax", (blocks,), (scales,))
        require_tensor(index, f"{name}.quant_map", (16,), (torch.float32,))
        if nested:
            runs = -(-blocks // NESTED_BLOCK)
            require_tensor(index, f"{name}.nested_absmax", (runs,), (torch.float32,))
            require_tensor(index, f"{name}.nested_quant_map", (256,), (torch.float32,))
        state = f"{name}.quant_state.bitsandbytes__{kind}"
        shape = index.tensors[state].shape if state in index.tensors else (0,)
        require_tensor(index, state, shape, (torch.uint8,))
        codec = Nf4Codec(group, double_quant=False) if kind == "nf4" else Fp4Codec(group)
        return _BnbLinear(stem, out_features, in_features, codec, nested)


@dataclass(frozen=True)
class _LlmInt8Linear(PackedLinear):
    def _read_packed(self, reader: RowReader, span: Span) -> Tensor:
        order = int(reader.read_rows(f"{self.stem}.weight_format"))
        if order:
            raise ValueError(f"its weight_format is {order}, not row-major (0)")
        codes = reader.read_rows(f"{self.stem}.weight", span).view(torch.uint8)
        absmax = reader.read_rows(f"{self.stem}.SCB", span).unsqueeze(1)
        pad = codes.new_zeros(len(span), align_to_4_bytes(self.in_features) - self.in_features)
        return torch.cat((codes, pad, view_as_bytes(absmax)), 1)


@dataclass(frozen=True)
class LlmInt8Format(PackedFormat):
    """bitsandbytes LLM.int8. Its outliers of activations are not used: products have activations
    as they are."""

    MARK: ClassVar[str] = ".SCB"
    OTHERS: ClassVar[tuple[str, ...]] = (".weight", ".weight_format")

    @classmethod
    def from_settings(cls, settings: Settings, index: SafetensorsIndex) -> Self:
        return cls("bitsandbytes", QuantConfig(kind="llm_int8"))

    def open_linear(
        self, index: SafetensorsIndex, stem: str, out_features: int, in_features: int
    ) -> PackedLinear:
        require_tensor(index, f"{stem}.weight", (out_features, in_features), (torch.int8,))
        require_tensor(index, f"{stem}.SCB", (out_features,), (torch.float32,))
        require_tensor(index, f"{stem}.weight_format", (), (torch.uint8,))
        return _LlmInt8Linear(stem, out_features, in_features, LlmInt8Codec())
