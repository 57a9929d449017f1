"""E2M1, the 4-bit floats of MXFP4 and NVFP4, in groups with a scale.

A code is a sign (bit 3), two bits of exponent and one of mantissa; the levels are 0, 0.5, 1, 1.5,
2, 3, 4, 6 and their opposites. A weight is ``LEVELS[code] * scale of its group``, a float32 product
that is rounded once to the wanted type.

The formats differ in their scales and in the size of a group; in both a row begins with its codes,
the even element of a byte in the low nibble, and is zero-padded to whole groups.
"""

from abc import ABC, abstractmethod
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from dist_peft.core.config.run import QuantConfig
from dist_peft.quant.codec_defaults import CodecDefaults
from dist_peft.quant.device_choice import RowLayout, dequantize_on_device
from dist_peft.quant.kept_grid import encode_nearest_on_grid
from dist_peft.quant.kernels import dequantize_by_table
from dist_peft.quant.packed_rows import check_packed_rows

__all__ = ["E2M1_LEVELS", "E2m1Codec", "find_nearest_e2m1"]

_POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_LEVELS = (*_POSITIVE, *(-level for level in _POSITIVE))
"""Values of the 16 codes; code 8 is -0.0."""


class E2m1Codec(CodecDefaults, ABC):
    """The parts that codecs of E2M1 share; ``quant.codec.Codec`` describes the methods.

    Attributes:
        kind: name of the format, as in ``base.quant.kind``.
        group_size: weights that share a scale.
    """

    codec_version: ClassVar[int] = 1
    config_keys: ClassVar[tuple[str, ...]] = ("bits", "group_size")
    kind: ClassVar[Literal["mxfp4", "nvfp4"]]
    group_size: ClassVar[int]

    @classmethod
    def from_config(cls, quant: QuantConfig) -> Self:
        """The codec of a ``base.quant`` section with this ``kind``; it has no options."""
        return cls()

    @property
    def name(self) -> str:
        return self.kind

    def describe_storage(self) -> str:
        """Return kind, bits and group size."""
        return f"{self.kind}, 4 bits in groups of {self.group_size}"

    def count_groups(self, in_features: int) -> int:
        """Return the number of scales of a row."""
        return -(-in_features // self.group_size)

    @abstractmethod
    def num_row_bytes(self, in_features: int) -> int:
        """Bytes of a packed row; a multiple of 4."""

    @abstractmethod
    def read_statistics(self, packed: Tensor, in_features: int) -> Tensor:
        """Return the scales that decoding uses, ``float32 [rows, groups]``."""

    @abstractmethod
    def quantize_to_packed(self, weight: Tensor) -> Tensor:
        """float ``[rows, in]`` -> ``uint8 [rows, row_bytes]``."""

    def dequantize_rows(self, packed: Tensor, in_features: int, dtype: torch.dtype) -> Tensor:
        """``uint8 [rows, row_bytes]`` -> ``dtype [rows, in]``."""
        described = self._describe_rows(in_features)
        check_packed_rows(packed, described.row_bytes, self.name, in_features)

        def by_torch(some: Tensor) -> Tensor:
            scale = self.read_statistics(some, in_features)
            payload = some[:, : described.scales]
            return dequantize_by_table(payload, 4, E2M1_LEVELS, scale, in_features, dtype)

        fused = dequantize_on_device(packed, described, in_features, dtype, by_torch)
        return by_torch(packed) if fused is None else fused

    @property
    def grid_rows(self) -> Self:
        """The codec itself."""
        return self

    @property
    def code_bits(self) -> int:
        """4."""
        return 4

    def encode_on_grid(self, values: Tensor, kept: Tensor, in_features: int) -> Tensor:
        """Return ``values`` in codes on the scales of ``kept``."""
        scale = self.read_statistics(kept, in_features)
        return encode_nearest_on_grid(
            values,
            kept,
            scale,
            scale.shape[1] * self.group_size,
            find_nearest_e2m1,
            bits=4,
            group_size=self.group_size,
            zero_mask=7,
        )

    def _describe_rows(self, in_features: int) -> RowLayout:
        groups = self.count_groups(in_features)
        return RowLayout(
            bits=4,
            group_size=self.group_size,
            groups=groups,
            scales=groups * self.group_size // 2,
            runs=0,
            row_bytes=self.num_row_bytes(in_features),
            kind=self.kind,
        )


def find_nearest_e2m1(scaled: Tensor) -> Tensor:
    """Codes of the levels nearest to float32 values: ``uint8``, same shape.

    Halves go to the even code, and magnitudes above 6 to 6. Between 0 and 2 levels are 0.5 apart,
    then 1 and 2, so that rounding to integers, halves to even, of the multiple is that of the code.
    """
    size = scaled.abs()
    above_four = (size / 2).round_().add_(4)
    above_two = size.round().add_(2)
    below_two = (size * 2).round_()
    code = torch.where(size < 4, torch.where(size < 2, below_two, above_two), above_four)
    return code.clamp_(max=7).add_(scaled.signbit(), alpha=8).to(torch.uint8)
