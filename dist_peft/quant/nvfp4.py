"""NVFP4: E2M1 numbers with an E4M3 scale for each 16, and a float32 factor above these.

The scales of a row's groups share a factor, since E4M3 alone has too small a range::

    g    = the largest power of two up to 448 * 6 / max |w| of the row; 1 for a row of zeros
    s_j  = E4M3(g * a_j / 6)                       a_j = max |w_i| of group j; at least 2**-9
    c_i  = E2M1 level nearest to w_i / (s_j / g), ties to the even code, at most 6
    w'_i = LEVELS[c_i] * (s_j / g)                 a quotient and a product in float32

Levels and their order in a byte are those of ``quant.e2m1``.

Row layout (``groups = ceil(in / 16)``; the row is zero-padded to whole groups)::

    | codes, even element in the low nibble | E4M3 scale per group | 0 pad | g float32 |
    ^ 8 * groups bytes                                             ^ to a multiple of 4

Files (compressed-tensors ``nvfp4-pack-quantized``) have one ``g`` a tensor, the divisor of scales
there too; here every row has a copy. Encoding takes a ``g`` for each row, so that rows stand alone.
As it is a power of two, rows of one tensor can be given a common one by exact products of their
scales (``export.formats.nvfp4_format``), unless a scale falls out of E4M3's range.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from dist_peft.quant.e2m1 import E2m1Codec, find_nearest_e2m1
from dist_peft.quant.pack import pack_bits
from dist_peft.quant.packed_rows import (
    align_to_4_bytes,
    check_finite_statistics,
    divide_exactly,
    quantize_in_groups,
    read_packed_field,
)

__all__ = ["NVFP4_GROUP", "Nvfp4Codec"]

NVFP4_GROUP = 16
"""Weights that share an E4M3 scale."""

_LARGEST_SCALE, _SMALLEST_SCALE = 448.0, 2.0**-9
_LARGEST_LEVEL = 6.0
_LARGEST_FACTOR = 2.0**126


@dataclass(frozen=True)
class Nvfp4Codec(E2m1Codec):
    """The NVFP4 codec, without options. See the module for formula and layout."""

    codec_version: ClassVar[int] = 2  # 1: divisors that are no powers of two
    kind: ClassVar[Literal["nvfp4"]] = "nvfp4"
    group_size: ClassVar[int] = NVFP4_GROUP

    def read_statistics(self, packed: Tensor, in_features: int) -> Tensor:
        """Return the scales that decoding uses, ``float32 [rows, groups]``."""
        _, stored, factor = self.split_packed_rows(packed, in_features)
        return stored.float() / factor

    @property
    def nvfp4_rows(self) -> Self:
        """The codec itself."""
        return self

    def split_packed_rows(self, packed: Tensor, in_features: int) -> tuple[Tensor, Tensor, Tensor]:
        """Codes ``uint8 [rows, groups * 8]``, E4M3 scales ``[rows, groups]`` and divisors
        ``float32 [rows, 1]``."""
        groups = self.count_groups(in_features)
        end = groups * NVFP4_GROUP // 2
        stored = read_packed_field(packed, end, groups, torch.float8_e4m3fn)
        return (
            packed[:, :end],
            stored,
            read_packed_field(packed, packed.shape[1] - 4, 1, torch.float32),
        )

    def num_row_bytes(self, in_features: int) -> int:
        """Bytes of a packed row; a multiple of 4."""
        groups = self.count_groups(in_features)
        return align_to_4_bytes(groups * (NVFP4_GROUP // 2 + 1)) + 4

    def quantize_to_packed(self, weight: Tensor) -> Tensor:
        """float ``[rows, in]`` -> ``uint8 [rows, row_bytes]``.

        Raises:
            ValueError: no floating-point matrix, or a value is NaN or infinite.
        """

        def quantize_chunk(groups: Tensor, first_row: int) -> Sequence[Tensor]:
            absmax = groups.abs().amax(dim=-1)
            check_finite_statistics(absmax, NVFP4_GROUP, first_row)
            if not absmax.shape[1]:
                return (absmax.new_ones(len(absmax), 1),)
            largest = absmax.amax(1, keepdim=True)
            top = torch.full_like(largest, _LARGEST_SCALE * _LARGEST_LEVEL)
            exponent = (top / largest).clamp_(max=_LARGEST_FACTOR).frexp()[1]
            power = torch.ldexp(torch.ones_like(largest), exponent - 1)
            factor = torch.where(largest > 0, power, 1.0)
            wanted = divide_exactly(absmax * factor, _LARGEST_LEVEL)
            stored = wanted.clamp_(_SMALLEST_SCALE, _LARGEST_SCALE).to(torch.float8_e4m3fn)
            scale = stored.float() / factor
            payload = pack_bits(find_nearest_e2m1(groups / scale.unsqueeze(-1)).flatten(1), 4)
            codes = stored.view(torch.uint8)
            pad = codes.new_zeros(len(codes), -codes.shape[1] % 4)
            return payload, codes, pad, factor

        row_bytes = self.num_row_bytes(weight.shape[-1] if weight.dim() else 0)
        return quantize_in_groups(weight, NVFP4_GROUP, row_bytes, quantize_chunk)
