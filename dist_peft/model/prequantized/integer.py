"""Integer linears of GPTQ, AWQ and compressed-tensors (bit layouts: ``quant.import_formats``).

GPTQ and AWQ have ``out`` last, so that the rows of a rank are columns there: one piece of each row
of the file's tensor is read. The zeros of neighbouring rows share words; a rank reads the words
that its rows need.

One scale a row (``group_size`` -1, strategy ``channel``) is stored as groups with equal scales, of
the largest size up to 128 that divides every linear: the codec's groups have one size in a base.
"""

from dataclasses import dataclass
from typing import ClassVar, Self, cast

import torch
from torch import Tensor
from torch.nn import functional

from dist_peft.core.config.run import QuantConfig
from dist_peft.core.errors import UserError
from dist_peft.core.span import Span
from dist_peft.model.prequantized.column_order import choose_ordered_codec
from dist_peft.model.prequantized.integer_settings import (
    check_bits,
    find_common_group_size,
    list_code_shapes,
    read_group_size,
)
from dist_peft.model.prequantized.linear import (
    UNQUANTIZED_HINT,
    PackedFormat,
    PackedLinear,
    ScaleRounding,
    Settings,
    count_whole_groups,
    find_layout,
    read_only_group,
    refuse_extras,
    require_tensor,
)
from dist_peft.quant.affine import AffineCodec
from dist_peft.quant.codec import Codec
from dist_peft.quant.import_formats import (
    convert_awq_rows,
    convert_compressed_rows,
    convert_gptq_rows,
    find_word_span,
    increment_codes,
    unpack_awq_zeros,
    unpack_gptq_zeros,
)
from dist_peft.quant.ordered_columns import OrderedColumnsCodec
from dist_peft.store.index import SafetensorsIndex
from dist_peft.store.reader import RowReader

__all__ = ["AwqFormat", "CompressedTensorsFormat", "GptqFormat"]

_INT32 = (torch.int32,)
_SCALES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class _IntegerLinear(PackedLinear):
    affine: AffineCodec
    """``codec``, or of the sorted columns where this one has an order."""
    rounding: ScaleRounding

    @property
    def _num_bits(self) -> int:
        return self.affine.bits

    def _repeat_over_groups(self, numbers: Tensor) -> Tensor:
        """Repeat ``[n, groups of the file]`` to ``[n, groups of the codec]``."""
        groups = self.in_features // self.affine.group_size
        return numbers.repeat_interleave(groups // numbers.shape[1], 1)

    def _sort_columns(self, packed: Tensor) -> Tensor:
        """Rows with codes in the order of the file -> rows of the codec."""
        if self.codec is self.affine:
            return packed
        return cast(OrderedColumnsCodec, self.codec).sort_columns(packed, self.in_features)


# -- GPTQ ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _GptqLinear(_IntegerLinear):
    group_size: int  # of the file
    first_version: bool
    indexed: bool

    def _read_packed(self, reader: RowReader, span: Span) -> Tensor:
        if self.indexed:
            self._check_group_order(reader)
        words, before = find_word_span(span, self._num_bits)
        qzeros = reader.read_rows(f"{self.stem}.qzeros", columns=words)
        zero = unpack_gptq_zeros(
            increment_codes(qzeros, self._num_bits) if self.first_version else qzeros,
            before,
            len(span),
            self._num_bits,
        )
        scale = self.rounding.round_scale(reader.read_rows(f"{self.stem}.scales", columns=span).T)
        qweight = reader.read_rows(f"{self.stem}.qweight", columns=span)
        return self._sort_columns(
            convert_gptq_rows(
                qweight, self._repeat_over_groups(scale), self._repeat_over_groups(zero)
            )
        )

    def _check_group_order(self, reader: RowReader) -> None:
        name = f"{self.stem}.g_idx"
        if torch.equal(reader.read_rows(name), torch.arange(self.in_features) // self.group_size):
            return
        raise UserError(
            f"tensor {name} in {reader.index.path} puts columns into groups in another order than "
            "theirs, though quantization_config has desc_act: false; set it to true if that is so"
        )


@dataclass(frozen=True)
class GptqFormat(PackedFormat):
    """GPTQ, both versions of its zeros."""

    MARK: ClassVar[str] = ".qweight"
    OTHERS: ClassVar[tuple[str, ...]] = (".qzeros", ".scales", ".g_idx")

    per_row: bool = False
    act_order: bool = False

    @classmethod
    def from_settings(cls, settings: Settings, index: SafetensorsIndex) -> Self:
        bits = check_bits(settings.get("bits"), "bits", index)
        label = str(settings.get("checkpoint_format") or settings.get("format") or "gptq").lower()
        if label not in ("gptq", "gptq_v2") or settings.get("is_marlin_format"):
            raise UserError(
                f"{index.path} is GPTQ in the layout {label!r}; gptq and gptq_v2 are read: "
                f"convert it (gptqmodel does), or {UNQUANTIZED_HINT}"
            )
        if settings.get("pack_dtype", "int32") != "int32":
            raise UserError(
                f"{index.path} is GPTQ packed into {settings['pack_dtype']} words, not int32; "
                f"{UNQUANTIZED_HINT}"
            )
        if bits == 3 and label == "gptq":
            raise UserError(
                f"{index.path} is GPTQ of 3 bits in the layout gptq, whose writers disagree about "
                f"how zeros less one lie in words; save it as gptq_v2, or {UNQUANTIZED_HINT}"
            )
        wanted = settings.get("group_size", 128)
        per_row = wanted == -1
        inputs = (words * 32 // bits for words, _ in list_code_shapes(index, cls.MARK))
        group_size = (
            find_common_group_size(inputs, index) if per_row else read_group_size(wanted, index)
        )
        quant = QuantConfig(kind="int", bits=bits, group_size=group_size)
        return cls(label, quant, per_row=per_row, act_order=settings.get("desc_act") is True)

    def open_linear(
        self, index: SafetensorsIndex, stem: str, out_features: int, in_features: int
    ) -> PackedLinear:
        bits, own = self.quant.bits, self.quant.group_size
        group_size = in_features if self.per_row else own
        groups = count_whole_groups(stem, in_features, group_size)
        require_tensor(
            index, f"{stem}.qweight", (-(-in_features * bits // 32), out_features), _INT32
        )
        require_tensor(index, f"{stem}.qzeros", (groups, -(-out_features * bits // 32)), _INT32)
        require_tensor(index, f"{stem}.scales", (groups, out_features), _SCALES)
        indexed = f"{stem}.g_idx" in index.tensors
        if indexed:
            require_tensor(index, f"{stem}.g_idx", (in_features,), (torch.int32, torch.int64))
        elif self.act_order:
            raise UserError(
                f"{index.path} has desc_act: true but no {stem}.g_idx, which holds the order of "
                f"columns; {UNQUANTIZED_HINT}"
            )
        affine = AffineCodec(bits, own)
        codec: Codec = affine
        if self.act_order:
            codec = choose_ordered_codec(index, f"{stem}.g_idx", affine, in_features, group_size)
            indexed = False  # checked
        first = self.label == "gptq"
        return _GptqLinear(
            stem,
            out_features,
            in_features,
            codec,
            affine,
            self.rounding,
            group_size,
            first,
            indexed,
        )


# -- AWQ -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _AwqLinear(_IntegerLinear):
    def _read_packed(self, reader: RowReader, span: Span) -> Tensor:
        words, before = find_word_span(span, self._num_bits)
        zero = unpack_awq_zeros(
            reader.read_rows(f"{self.stem}.qzeros", columns=words), before, len(span)
        )
        scale = self.rounding.round_scale(reader.read_rows(f"{self.stem}.scales", columns=span).T)
        qweight = reader.read_rows(f"{self.stem}.qweight", columns=words)
        return convert_awq_rows(
            qweight, before, self._repeat_over_groups(scale), self._repeat_over_groups(zero)
        )


@dataclass(frozen=True)
class AwqFormat(PackedFormat):
    """AWQ in the GEMM layout: 4 bits, integer zeros."""

    MARK: ClassVar[str] = ".qweight"
    OTHERS: ClassVar[tuple[str, ...]] = (".qzeros", ".scales")

    per_row: bool = False

    @classmethod
    def from_settings(cls, settings: Settings, index: SafetensorsIndex) -> Self:
        bits = settings.get("bits", settings.get("w_bit", 4))
        if bits != 4:
            raise UserError(f"{index.path} is AWQ of {bits} bits; 4 are read: {UNQUANTIZED_HINT}")
        layout = str(settings.get("version") or settings.get("format") or "gemm").lower()
        if layout != "gemm":
            raise UserError(
                f"{index.path} is AWQ in the layout {layout!r}; gemm is read: convert it, "
                f"or {UNQUANTIZED_HINT}"
            )
        if settings.get("zero_point", True) is not True:
            raise UserError(
                f"{index.path} is AWQ without zeros (zero_point: false); {UNQUANTIZED_HINT}"
            )
        wanted = settings.get("group_size", settings.get("q_group_size", 128))
        per_row = wanted == -1
        inputs = (rows for rows, _ in list_code_shapes(index, cls.MARK))
        group_size = (
            find_common_group_size(inputs, index) if per_row else read_group_size(wanted, index)
        )
        return cls("awq", QuantConfig(kind="int", bits=4, group_size=group_size), per_row=per_row)

    def open_linear(
        self, index: SafetensorsIndex, stem: str, out_features: int, in_features: int
    ) -> PackedLinear:
        own = self.quant.group_size
        groups = count_whole_groups(stem, in_features, in_features if self.per_row else own)
        words = -(-out_features // 8)
        require_tensor(index, f"{stem}.qweight", (in_features, words), _INT32)
        require_tensor(index, f"{stem}.qzeros", (groups, words), _INT32)
        require_tensor(index, f"{stem}.scales", (groups, out_features), _SCALES)
        codec = AffineCodec(4, own)
        return _AwqLinear(stem, out_features, in_features, codec, codec, self.rounding)


# -- compressed-tensors ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _CompressedLinear(_IntegerLinear):
    symmetric: bool

    @property
    def has_middle_zeros(self) -> bool:
        """Whether there are no zero points."""
        return self.symmetric

    def _read_packed(self, reader: RowReader, span: Span) -> Tensor:
        shape = reader.read_rows(f"{self.stem}.weight_shape").tolist()
        if shape != [self.out_features, self.in_features]:
            raise ValueError(
                f"weight_shape is {shape}, not {[self.out_features, self.in_features]}"
            )
        scale = self.rounding.round_scale(reader.read_rows(f"{self.stem}.weight_scale", span))
        if self.symmetric:
            zero = torch.full_like(scale, 2 ** (self._num_bits - 1))
        else:
            zero = self._read_zero_points(reader, span)
        packed = reader.read_rows(f"{self.stem}.weight_packed", span)
        return self._sort_columns(
            convert_compressed_rows(
                packed, self._repeat_over_groups(scale), self._repeat_over_groups(zero)
            )
        )

    def _read_zero_points(self, reader: RowReader, span: Span) -> Tensor:
        name = f"{self.stem}.weight_zero_point"
        words, before = find_word_span(span, self._num_bits)
        there = Span(words.start, min(words.stop, reader.index.find_tensor(name).num_rows))
        read = functional.pad(reader.read_rows(name, there).T, (0, len(words) - len(there)))
        return unpack_gptq_zeros(read, before, len(span), self._num_bits)


@dataclass(frozen=True)
class CompressedTensorsFormat(PackedFormat):
    """compressed-tensors' ``pack-quantized``: integers in groups or with one scale a row."""

    MARK: ClassVar[str] = ".weight_packed"
    OTHERS: ClassVar[tuple[str, ...]] = (
        ".weight_scale",
        ".weight_zero_point",
        ".weight_shape",
        ".weight_g_idx",
    )

    per_row: bool = False
    symmetric: bool = True

    @classmethod
    def from_settings(cls, settings: Settings, index: SafetensorsIndex) -> Self:
        weights = _read_weight_scheme(settings, index)
        bits = check_bits(weights.get("num_bits"), "num_bits", index)
        strategy = weights.get("strategy") or ("group" if weights.get("group_size") else "channel")
        if strategy not in ("group", "channel"):
            raise UserError(
                f"{index.path} has one scale a {strategy}; strategies group and channel are read: "
                f"{UNQUANTIZED_HINT}"
            )
        per_row = strategy == "channel"
        inputs = (words * 32 // bits for _, words in list_code_shapes(index, cls.MARK))
        wanted = weights.get("group_size")
        group_size = (
            find_common_group_size(inputs, index) if per_row else read_group_size(wanted, index)
        )
        quant = QuantConfig(kind="int", bits=bits, group_size=group_size)
        symmetric = weights.get("symmetric", True) is True
        return cls("compressed-tensors", quant, per_row=per_row, symmetric=symmetric)

    def open_linear(
        self, index: SafetensorsIndex, stem: str, out_features: int, in_features: int
    ) -> PackedLinear:
        bits, own = self.quant.bits, self.quant.group_size
        groups = count_whole_groups(stem, in_features, in_features if self.per_row else own)
        packed = (out_features, -(-in_features * bits // 32))
        require_tensor(index, f"{stem}.weight_packed", packed, _INT32)
        require_tensor(index, f"{stem}.weight_scale", (out_features, groups), _SCALES)
        require_tensor(index, f"{stem}.weight_shape", (2,), (torch.int64, torch.int32))
        if not self.symmetric:
            zeros = (-(-out_features * bits // 32), groups)
            require_tensor(index, f"{stem}.weight_zero_point", zeros, _INT32)
        affine = AffineCodec(bits, own)
        codec: Codec = affine
        ordered = f"{stem}.weight_g_idx"
        if ordered in index.tensors:
            require_tensor(index, ordered, (in_features,), (torch.int32, torch.int64))
            codec = choose_ordered_codec(index, ordered, affine, in_features, own)
        return _CompressedLinear(
            stem, out_features, in_features, codec, affine, self.rounding, self.symmetric
        )


def _read_weight_scheme(settings: Settings, index: SafetensorsIndex) -> Settings:
    """Return ``weights`` of the only config group; refuse settings that change the function."""
    group = read_only_group(settings, index)
    layout = find_layout(settings)
    weights = group.get("weights")
    if layout != "pack-quantized" or not isinstance(weights, dict) or weights.get("type") != "int":
        kind = weights.get("type") if isinstance(weights, dict) else None
        raise UserError(
            f"{index.path} is compressed-tensors of format {layout!r} with weights of type "
            f"{kind!r}; pack-quantized with type int is read, and float-quantized, "
            "nvfp4-pack-quantized and mxfp4-pack-quantized: "
            f"{UNQUANTIZED_HINT}"
        )
    refuse_extras(settings, group, weights, index)
    return weights
