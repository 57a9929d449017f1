"""MXFP4 of the OCP Microscaling specification 1.0: E2M1 numbers, a power of two for each 32.

A group of 32 weights of a row shares one exponent, stored in a byte (E8M0)::

    a    = max |w_i|
    e    = the least integer with 6 * 2^e >= a         byte e + 127
    c_i  = the code whose level is nearest to w_i / 2^e, ties to the even code
    w'_i = LEVELS[c_i] * 2^e                           exact in float32 and in bfloat16

A code is a sign (bit 3), two bits of exponent and one of mantissa; the levels are 0, 0.5, 1, 1.5,
2, 3, 4, 6 and their opposites.

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
from typing import ClassVar, Self

import torch
from torch import Tensor

from dist_peft.core.config.run import QuantConfig
from dist_peft.quant.codec_defaults import CodecDefaults
from dist_peft.quant.pack import lookup_packed_values, pack_bits
from dist_peft.quant.packed_rows import (
    align_to_4_bytes,
    check_finite_statistics,
    check_packed_rows,
    list_row_chunks,
    quantize_in_groups,
    read_packed_field,
)
from dist_peft.quant.table_cache import cache_tables

__all__ = ["E2M1_LEVELS", "MXFP4_GROUP", "Mxfp4Codec", "dequantize_e2m1", "find_nearest_e2m1"]

MXFP4_GROUP = 32
"""Weights that share an exponent."""

_POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_LEVELS = (*_POSITIVE, *(-level for level in _POSITIVE))
"""Values of the 16 codes; code 8 is -0.0."""

_BIAS = 127
_LARGEST = 125
"""The largest exponent with which 6 is finite in float32."""


@dataclass(frozen=True)
class Mxfp4Codec(CodecDefaults):
    """The MXFP4 codec, without options. See the module for formula and layout."""

    config_keys: ClassVar[tuple[str, ...]] = ("bits", "group_size")

    @classmethod
    def from_config(cls, quant: QuantConfig) -> Self:
        """The codec of a ``base.quant`` section with ``kind: mxfp4``."""
        return cls()

    @property
    def name(self) -> str:
        return "mxfp4"

    def describe_storage(self) -> str:
        """Return kind, bits and group size."""
        return f"mxfp4, 4 bits in groups of {MXFP4_GROUP}"

    def read_statistics(self, packed: Tensor, in_features: int) -> Tensor:
        """Return the scales ``float32 [rows, groups]``; NaN for bytes above 252."""
        groups = -(-in_features // MXFP4_GROUP)
        exponents = read_packed_field(packed, groups * MXFP4_GROUP // 2, groups, torch.uint8)
        scales = _build_powers(packed.device)[exponents.int()]
        return scales.masked_fill_(exponents > _LARGEST + _BIAS, torch.nan)

    def num_row_bytes(self, in_features: int) -> int:
        """Bytes of a packed row; a multiple of 4."""
        groups = -(-in_features // MXFP4_GROUP)
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

    def dequantize_rows(self, packed: Tensor, in_features: int, dtype: torch.dtype) -> Tensor:
        """``uint8 [rows, row_bytes]`` -> ``dtype [rows, in]``."""
        check_packed_rows(packed, self.num_row_bytes(in_features), self.name, in_features)
        scale = self.read_statistics(packed, in_features)
        payload = packed[:, : scale.shape[1] * MXFP4_GROUP // 2]
        return dequantize_e2m1(payload, scale, in_features, dtype)


def dequantize_e2m1(payload: Tensor, scale: Tensor, in_features: int, dtype: torch.dtype) -> Tensor:
    """E2M1 codes and scales -> weight: a float32 product, rounded once.

    Args:
        payload: ``uint8 [rows, groups * group_size / 2]``, even element in the low nibble.
        scale: ``float32 [rows, groups]``.
        in_features: columns of the result; the rest of the last group is padding.
        dtype: type of the result.

    Returns:
        ``dtype [rows, in_features]``.
    """
    rows, groups = scale.shape
    weight = torch.empty(rows, in_features, dtype=dtype, device=payload.device)
    if not weight.numel():
        return weight
    for span in list_row_chunks(rows, in_features, payload.device):
        numbers = lookup_packed_values(payload[span.slice], 4, E2M1_LEVELS)
        numbers.view(len(span), groups, -1).mul_(scale[span.slice].unsqueeze(-1))
        weight[span.slice] = numbers[:, :in_features]
    return weight


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
