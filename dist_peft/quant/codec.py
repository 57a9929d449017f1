"""The codec protocol and the list of codecs.

A codec turns the rows of a frozen weight into self-contained packed rows and back::

    float [rows, in]  --encode-->  uint8 [rows, row_bytes]  --decode-->  float [rows, in]

Both directions are row-local, bit for bit: ``encode(w)[a:b]`` equals ``encode(w[a:b])``. So each
rank encodes just the rows that it keeps, and the result does not depend on how many ranks there
are. Codecs are frozen dataclasses: hashable, comparable, picklable.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor

from dist_peft.core.config.run import QuantConfig
from dist_peft.quant.affine import AffineCodec
from dist_peft.quant.codec_defaults import (
    AffineRows,
    CodecDefaults,
    Fp8Rows,
    GridRows,
    Int8Rows,
    Mxfp4Rows,
    Nf4Rows,
    Nvfp4Rows,
    OrderedRows,
)
from dist_peft.quant.fp4 import Fp4Codec
from dist_peft.quant.fp8 import Fp8Codec
from dist_peft.quant.llm_int8 import LlmInt8Codec
from dist_peft.quant.mxfp4 import Mxfp4Codec
from dist_peft.quant.nf4 import Nf4Codec
from dist_peft.quant.nvfp4 import Nvfp4Codec
from dist_peft.quant.packed_rows import align_to_4_bytes, check_float_weight, check_packed_rows

__all__ = [
    "Codec",
    "RawCodec",
    "describe_quant",
    "find_unused_quant_keys",
    "get_codec_version",
    "list_quant_keys",
    "make_codec",
    "make_finer_codec",
]


class Codec(Protocol):
    """How frozen rows are packed."""

    @property
    def name(self) -> str:
        """Short name, such as ``nf4``, ``int4``, ``raw``."""

    codec_version: ClassVar[int]
    """Raised whenever packed bytes or decoded values of the same weight change. Adapters, merged
    directories and checkpoints keep it; without one they are of version 1."""

    @property
    def is_quantized(self) -> bool:
        """Whether a row has fewer bits than its numbers; false for raw rows."""

    @property
    def affine_rows(self) -> AffineRows | None:
        """How packed rows are split into integer codes, scales and zeros, which QA-LoRA merges
        into; None for other rows."""

    @property
    def nf4_rows(self) -> Nf4Rows | None:
        """How packed rows are split into NF4 codes and scales; None for other rows."""

    @property
    def fp8_rows(self) -> Fp8Rows | None:
        """How packed rows are split into FP8 codes and scales; None for other rows."""

    @property
    def mxfp4_rows(self) -> Mxfp4Rows | None:
        """How packed rows are split into MXFP4's codes and exponents; None for other rows."""

    @property
    def nvfp4_rows(self) -> Nvfp4Rows | None:
        """How packed rows are split into NVFP4's codes and scales; None for other rows."""

    @property
    def fp4_rows(self) -> Nf4Rows | None:
        """How packed rows are split into bitsandbytes' FP4 codes and scales; None for others."""

    @property
    def int8_rows(self) -> Int8Rows | None:
        """How packed rows are split into LLM.int8's codes and magnitudes; None for other rows."""

    @property
    def ordered_rows(self) -> OrderedRows | None:
        """Order of the columns in groups (act-order); None: that of the weight."""

    @property
    def grid_rows(self) -> GridRows | None:
        """How codes are chosen again while scales stay; None: they cannot be."""

    def describe_storage(self) -> str:
        """Return type, bits and groups in a few words, for reports."""

    def read_statistics(self, packed: Tensor, in_features: int) -> Tensor:
        """Return all scales and zeros of packed rows, ``float [rows, n]``; n is 0 for raw rows."""

    def num_row_bytes(self, in_features: int) -> int:
        """Bytes of a packed row; a multiple of 4."""

    def quantize_to_packed(self, weight: Tensor) -> Tensor:
        """float ``[rows, in]`` -> ``uint8 [rows, row_bytes]`` on the same device.

        Raises:
            ValueError: no floating-point matrix, or values that the codec cannot represent.
        """

    def dequantize_rows(self, packed: Tensor, in_features: int, dtype: torch.dtype) -> Tensor:
        """``uint8 [rows, row_bytes]`` -> ``dtype [rows, in]``; may be a view of ``packed``.

        Raises:
            ValueError: ``packed`` is not the output of ``encode`` for ``in_features``.
        """


class ConfiguredCodec(Codec, Protocol):
    """A codec that ``base.quant.kind`` can name."""

    config_keys: ClassVar[tuple[str, ...]]
    """Keys of ``base.quant`` that it depends on, in the order in which they are shown."""

    @classmethod
    def from_config(cls, quant: QuantConfig) -> Self:
        """Build the codec of a ``base.quant`` section of its kind."""


@dataclass(frozen=True)
class RawCodec(CodecDefaults):
    """No quantization: a row is its numbers in ``dtype``, zero-padded to a multiple of 4 bytes.

    Decoding to ``dtype`` is a view without a copy where rows are aligned for it.
    """

    dtype: torch.dtype = torch.bfloat16

    codec_version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if not self.dtype.is_floating_point:
            raise ValueError(f"raw rows hold a floating-point type, not {self.dtype}")

    @property
    def name(self) -> str:
        return "raw"

    @property
    def is_quantized(self) -> bool:
        """False: the numbers themselves are stored."""
        return False

    def describe_storage(self) -> str:
        """Return the type, such as ``bfloat16``."""
        return str(self.dtype).removeprefix("torch.")

    def read_statistics(self, packed: Tensor, in_features: int) -> Tensor:
        """Return ``float [rows, 0]``: raw rows have no scales."""
        return torch.empty(len(packed), 0)

    def num_row_bytes(self, in_features: int) -> int:
        """Bytes of a packed row; a multiple of 4."""
        return align_to_4_bytes(in_features * self.dtype.itemsize)

    def quantize_to_packed(self, weight: Tensor) -> Tensor:
        """Cast to ``dtype``; NaN and infinity pass when they were there before.

        Rows that need neither cast nor padding are not copied: the result shares their memory.

        Raises:
            ValueError: a finite value of ``weight`` is beyond the range of ``dtype``.
        """
        check_float_weight(weight)
        rows, in_features = weight.shape
        numbers = weight.detach().to(self.dtype).contiguous()
        self._check_dtype_range(weight, numbers)
        if self.num_row_bytes(in_features) == in_features * self.dtype.itemsize:
            return numbers.view(torch.uint8)
        packed = torch.zeros(
            rows, self.num_row_bytes(in_features), dtype=torch.uint8, device=weight.device
        )
        packed[:, : in_features * self.dtype.itemsize] = numbers.view(torch.uint8)
        return packed

    def dequantize_rows(self, packed: Tensor, in_features: int, dtype: torch.dtype) -> Tensor:
        """``uint8 [rows, row_bytes]`` -> ``dtype [rows, in]``, a view if nothing must change."""
        check_packed_rows(packed, self.num_row_bytes(in_features), self.name, in_features)
        size = self.dtype.itemsize
        aligned = packed.storage_offset() % size == 0 and packed.stride() == (packed.shape[1], 1)
        if not aligned or packed.shape[1] % size:
            packed = packed[:, : in_features * size].clone(memory_format=torch.contiguous_format)
        return packed.view(self.dtype)[:, :in_features].to(dtype)

    def _check_dtype_range(self, weight: Tensor, numbers: Tensor) -> None:
        narrower = torch.finfo(weight.dtype).max > torch.finfo(self.dtype).max
        if not narrower or not numbers.numel():
            return
        if all(bool(torch.isfinite(end)) for end in numbers.aminmax()):
            return
        overflow = torch.isinf(numbers) & torch.isfinite(weight)
        if bool(overflow.any()):
            row, column = (int(i) for i in overflow.nonzero()[0])
            raise ValueError(
                f"weight {float(weight[row, column]):.6g} in row {row}, column {column} is beyond "
                f"the range of {self.dtype}"
            )


_CODECS: dict[str, type[ConfiguredCodec]] = {
    "nf4": Nf4Codec,
    "int": AffineCodec,
    "mxfp4": Mxfp4Codec,
    "fp8": Fp8Codec,
    "nvfp4": Nvfp4Codec,
    "fp4": Fp4Codec,
    "llm_int8": LlmInt8Codec,
}
"""``base.quant.kind`` -> its codec."""


def make_codec(quant: QuantConfig | None, compute_dtype: torch.dtype) -> Codec:
    """The codec of a base: of ``quant``, or raw rows of ``compute_dtype`` without quantization."""
    return RawCodec(compute_dtype) if quant is None else _CODECS[quant.kind].from_config(quant)


def make_finer_codec(codec: Codec) -> Codec:
    """The codec of 8 bits with the groups of ``codec``, whose rows are codes with scales.

    Raises:
        ValueError: they are not.
    """
    rows = codec.affine_rows or codec.nf4_rows
    if rows is None:
        raise ValueError(f"rows of codec {codec.name} have no groups")
    return AffineCodec(8, rows.group_size)


def get_codec_version(kind: str) -> int:
    """Return ``codec_version`` of the codec that ``base.quant.kind`` names."""
    return _CODECS[kind].codec_version


def list_quant_keys(kind: str) -> tuple[str, ...]:
    """Return the keys of ``base.quant`` that describe a base of this kind; empty for no kind."""
    return ("kind", *_CODECS[kind].config_keys) if kind in _CODECS else ()


def find_unused_quant_keys(kind: str) -> Iterator[tuple[str, str]]:
    """Yield keys of ``base.quant`` without effect on this kind, each with the kinds it is for."""
    own = list_quant_keys(kind)
    for key in dict.fromkeys(key for codec in _CODECS.values() for key in codec.config_keys):
        if key not in own:
            yield key, ", ".join(name for name in _CODECS if key in list_quant_keys(name))


def describe_quant(quant: QuantConfig, keys: tuple[str, ...]) -> str:
    """Return the given ones of a kind's keys as text, such as ``int, 4 bits, group_size 64``."""
    values: Mapping[str, Any] = quant.model_dump(include=set(keys) | {"kind"})
    shown = [str(values["kind"])]
    for key in _CODECS[quant.kind].config_keys:
        if key not in keys or values[key] is False:
            continue
        if key == "bits":
            shown.append(f"{values[key]} bits")
        else:
            shown.append(key if values[key] is True else f"{key} {values[key]}")
    return ", ".join(shown)
