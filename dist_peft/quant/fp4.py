"""FP4 of bitsandbytes: sixteen levels and a float32 scale for each group of a row.

A group of ``group_size`` weights shares its largest magnitude, as in NF4 (``quant.nf4``)::

    a    = max |w_i|
    c_i  = the code whose level is nearest to w_i / a
    w'_i = LEVELS[c_i] * a              one float32 product, then rounded to the wanted type

The levels are a sign, two bits of exponent and one of mantissa, divided by the largest: 0, 1/192,
1/6, 1/4, 1/3, 1/2, 2/3, 1. Codes are not in the order of levels. Row layout::

    | codes, even element in the high nibble | absmax float32 per group |

A tie goes to the smaller magnitude.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Self

import torch
from torch import Tensor

from dist_peft.core.config.run import QuantConfig
from dist_peft.quant.codec_defaults import CodecDefaults
from dist_peft.quant.kept_grid import encode_nearest_on_grid
from dist_peft.quant.kernels import dequantize_by_table
from dist_peft.quant.pack import pack_bits
from dist_peft.quant.packed_rows import (
    align_to_4_bytes,
    check_finite_statistics,
    check_packed_rows,
    quantize_in_groups,
    read_packed_field,
)

__all__ = ["FP4_LEVELS", "Fp4Codec"]

_POSITIVE = (0.0, 0.005208333333, 0.66666667, 1.0, 0.33333333, 0.5, 0.16666667, 0.25)
FP4_LEVELS = (*_POSITIVE, 0.0, *(-level for level in _POSITIVE[1:]))
"""Values of the 16 codes, as bitsandbytes' ``quant_map`` has them; codes 0 and 8 are 0."""

_BY_SIZE = sorted(range(8), key=lambda code: _POSITIVE[code])
_BORDERS = tuple((_POSITIVE[low] + _POSITIVE[high]) / 2 for low, high in pairwise(_BY_SIZE))


@dataclass(frozen=True)
class Fp4Codec(CodecDefaults):
    """The codec of bitsandbytes' FP4. See the module for formula and layout.

    Attributes:
        group_size: weights that share a scale; any multiple of 8.
    """

    codec_version: ClassVar[int] = 1
    config_keys: ClassVar[tuple[str, ...]] = ("bits", "group_size")

    group_size: int = 64

    @classmethod
    def from_config(cls, quant: QuantConfig) -> Self:
        """The codec of a ``base.quant`` section with ``kind: fp4``."""
        return cls(quant.group_size)

    def __post_init__(self) -> None:
        if self.group_size < 8 or self.group_size % 8:
            raise ValueError(f"group_size {self.group_size} is not a positive multiple of 8")

    @property
    def name(self) -> str:
        return "fp4"

    def describe_storage(self) -> str:
        """Return kind, bits and group size."""
        return f"fp4, 4 bits in groups of {self.group_size}"

    def count_groups(self, in_features: int) -> int:
        """Return the number of scales of a row."""
        return -(-in_features // self.group_size)

    def _payload_bytes(self, in_features: int) -> int:
        return align_to_4_bytes(self.count_groups(in_features) * self.group_size // 2)

    def read_statistics(self, packed: Tensor, in_features: int) -> Tensor:
        """Return the scales ``float32 [rows, groups]``."""
        start, groups = self._payload_bytes(in_features), self.count_groups(in_features)
        return read_packed_field(packed, start, groups, torch.float32)

    def num_row_bytes(self, in_features: int) -> int:
        """Bytes of a packed row; a multiple of 4."""
        return self._payload_bytes(in_features) + 4 * self.count_groups(in_features)

    def quantize_to_packed(self, weight: Tensor) -> Tensor:
        """float ``[rows, in]`` -> ``uint8 [rows, row_bytes]``.

        Raises:
            ValueError: no floating-point matrix, or a value is NaN or infinite.
        """

        def quantize_chunk(groups: Tensor, first_row: int) -> Sequence[Tensor]:
            absmax = groups.abs().amax(dim=-1)
            check_finite_statistics(absmax, self.group_size, first_row)
            scaled = groups / torch.where(absmax > 0, absmax, 1.0).unsqueeze(-1)
            return pack_bits(_find_nearest_level(scaled).flatten(1), 4, high_first=True), absmax

        row_bytes = self.num_row_bytes(weight.shape[-1] if weight.dim() else 0)
        return quantize_in_groups(weight, self.group_size, row_bytes, quantize_chunk)

    @property
    def fp4_rows(self) -> Self:
        """The codec itself."""
        return self

    @property
    def double_quant(self) -> bool:
        """False: scales are float32."""
        return False

    def split_packed_rows(self, packed: Tensor, in_features: int) -> tuple[Tensor, Tensor]:
        """Payload ``uint8 [rows, groups * group_size / 2]`` (a view), scales ``[rows, groups]``."""
        check_packed_rows(packed, self.num_row_bytes(in_features), self.name, in_features)
        payload = packed[:, : self.count_groups(in_features) * self.group_size // 2]
        return payload, self.read_statistics(packed, in_features)

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
            _find_nearest_level,
            bits=4,
            group_size=self.group_size,
            high_first=True,
            zero_mask=7,
        )

    def dequantize_rows(self, packed: Tensor, in_features: int, dtype: torch.dtype) -> Tensor:
        """``uint8 [rows, row_bytes]`` -> ``dtype [rows, in]``."""
        payload, absmax = self.split_packed_rows(packed, in_features)
        return dequantize_by_table(
            payload, 4, FP4_LEVELS, absmax, in_features, dtype, high_first=True
        )


def _find_nearest_level(scaled: Tensor) -> Tensor:
    """Codes of the levels nearest to float32 values: ``uint8``, same shape; 0 is code 0."""
    borders = torch.tensor(_BORDERS, device=scaled.device)
    codes = torch.tensor(_BY_SIZE, dtype=torch.uint8, device=scaled.device)
    place = torch.bucketize(scaled.abs(), borders, out_int32=True)
    code = codes.index_select(0, place.flatten()).view(scaled.shape)
    return code.add_(((scaled < 0) & (code > 0)).to(torch.uint8), alpha=8)
