"""MXFP4 of the OCP Microscaling specification 1.0: E2M1 numbers, a power of two for each 32.

A group of 32 weights of a row shares one exponent, stored in a byte (E8M0)::

    a    = max |w_i|
    e    = the least integer with 6 * 2^e >= a         byte e + 127
    c_i  = the code whose level is nearest to w_i / 2^e, ties to the even code
    w'_i = LEVELS[c_i] * 2^e                           exact in float32 and in bfloat16

Levels and their order in a byte are those of ``quant.e2m1``.

The specification rounds the exponent down (``e = floor(log2 a) - 2``) and cuts what is above 6;
here it is rounded up, as by the ``triton_kernels`` with which ``transformers`` quantizes gpt-oss:
the largest weight is then never cut. Decoding is the same.

Row layout (``groups = ceil(in / 32)``; the row is zero-padded to whole groups)::

    | codes, even element in the low nibble | exponent byte per group | 0 pad |
    ^ 16 * groups bytes                                               ^ to a multiple of 4

Bytes 253 and 254 are exponents with which 6 is beyond float32, and 255 is NaN: none of them is
written, and ``read_statistics`` shows them as NaN.
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
    quantize_in_groups,
    read_packed_field,
)
from dist_peft.quant.table_cache import cache_tables

__all__ = ["MXFP4_GROUP", "Mxfp4Codec"]

MXFP4_GROUP = 32
"""Weights that share an exponent."""

_BIAS = 127
_LARGEST = 125
"""The largest exponent with which 6 is finite in float32."""


@dataclass(frozen=True)
class Mxfp4Codec(E2m1Codec):
    """The MXFP4 codec, without options. See the module for formula and layout."""

    kind: ClassVar[Literal["mxfp4"]] = "mxfp4"
    group_size: ClassVar[int] = MXFP4_GROUP

    def read_statistics(self, packed: Tensor, in_features: int) -> Tensor:
        """Return the scales ``float32 [rows, groups]``; NaN for bytes above 252."""
        groups = self.count_groups(in_features)
        exponents = read_packed_field(packed, groups * MXFP4_GROUP // 2, groups, torch.uint8)
        scales = _build_powers(packed.device)[exponents.int()]
        return scales.masked_fill_(exponents > _LARGEST + _BIAS, torch.nan)

    @property
    def mxfp4_rows(self) -> Self:
        """The codec itself."""
        return self

    def split_packed_rows(self, packed: Tensor, in_features: int) -> tuple[Tensor, Tensor]:
        """Codes ``uint8 [rows, groups * 16]`` and exponents ``uint8 [rows, groups]``, views."""
        groups = self.count_groups(in_features)
        end = groups * MXFP4_GROUP // 2
        return packed[:, :end], packed[:, end : end + groups]

    def num_row_bytes(self, in_features: int) -> int:
        """Bytes of a packed row; a multiple of 4."""
        groups = self.count_groups(in_features)
        return align_to_4_bytes(groups * (MXFP4_GROUP // 2 + 1))

    def quantize_to_packed(self, weight: Tensor) -> Tensor:
        """float ``[rows, in]`` -> ``uint8 [rows, row_bytes]``.

        Raises:
            ValueError: no floating-point matrix, or a value is NaN or infinite.
        """

        def quantize_chunk(groups: Tensor, first_row: int) -> Sequence[Tensor]:
            exponent = _choose_exponents(groups, first_row)
            factor = _build_powers(groups.device)[_BIAS - exponent]
            scaled = groups * factor.unsqueeze(-1)
            payload = pack_bits(find_nearest_e2m1(scaled).flatten(1), 4)
            stored = exponent.add_(_BIAS).to(torch.uint8)
            pad = -stored.shape[1] % 4
            return payload, stored, stored.new_zeros(len(stored), pad)

        row_bytes = self.num_row_bytes(weight.shape[-1] if weight.dim() else 0)
        return quantize_in_groups(weight, MXFP4_GROUP, row_bytes, quantize_chunk)


def _choose_exponents(groups: Tensor, first_row: int) -> Tensor:
    """Exponents of groups ``float32 [rows, groups, 32]``: ``int32 [rows, groups]``."""
    absmax = groups.abs().amax(dim=-1)
    check_finite_statistics(absmax, groups.shape[-1], first_row)
    # a = m * 2^e with m in [0.5, 1), and 6 * 2^k = 0.75 * 2^(k + 3)
    mantissa, exponent = torch.frexp(absmax)
    exponent = exponent.sub_(3).add_(mantissa > 0.75)
    exponent = torch.where(absmax > 0, exponent, -_BIAS)
    return exponent.clamp_(-_BIAS, _LARGEST)


@cache_tables
def _build_powers(device: torch.device) -> Tensor:
    """``2 ** (i - 127)``, ``float32 [255]``, and one more for NaN."""
    powers = [2.0 ** (i - _BIAS) for i in range(255)]
    return torch.tensor([*powers, torch.nan], device="cpu").to(device)
