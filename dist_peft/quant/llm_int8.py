"""Signed bytes with one float32 scale a row, as LLM.int8 stores weights (Dettmers et al. 2022).

    a    = max |w_i| of the row         "SCB" in files of bitsandbytes
    c_i  = round(w_i * (127 / a))
    w'_i = (c_i * a) * (1 / 127)        two float32 products, then rounded to the wanted type

The order of the products is that of bitsandbytes' ``int8_vectorwise_dequant``. Row layout::

    | codes, a signed byte each | 0 pad | a float32 |
    ^ in bytes, to a multiple of 4

LLM.int8 also rounds activations to 8 bits, but for outliers. Here products have the activations as
they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from dist_peft.core.config.run import QuantConfig
from dist_peft.quant.codec_defaults import CodecDefaults
from dist_peft.quant.kept_grid import encode_nearest_on_grid
from dist_peft.quant.packed_rows import (
    align_to_4_bytes,
    check_finite_statistics,
    check_packed_rows,
    list_row_chunks,
    quantize_in_groups,
    read_packed_field,
)

__all__ = ["LlmInt8Codec"]

_INVERSE = 7.874015718698502e-3
"""1 / 127 as bitsandbytes writes it."""


@dataclass(frozen=True)
class LlmInt8Codec(CodecDefaults):
    """The codec of LLM.int8's weights, without options. See the module for formula and layout."""

    codec_version: ClassVar[int] = 1
    config_keys: ClassVar[tuple[str, ...]] = ("bits",)

    @classmethod
    def from_config(cls, quant: QuantConfig) -> Self:
        """The codec of a ``base.quant`` section with ``kind: llm_int8``."""
        return cls()

    @property
    def name(self) -> str:
        return "llm_int8"

    def describe_storage(self) -> str:
        """Return kind and bits."""
        return "llm_int8, 8 bits with a scale for each row"

    def read_statistics(self, packed: Tensor, in_features: int) -> Tensor:
        """Return the largest magnitudes ``float32 [rows, 1]``."""
        return read_packed_field(packed, align_to_4_bytes(in_features), 1, torch.float32)

    def num_row_bytes(self, in_features: int) -> int:
        """Bytes of a packed row; a multiple of 4."""
        return align_to_4_bytes(in_features) + 4

    def quantize_to_packed(self, weight: Tensor) -> Tensor:
        """float ``[rows, in]`` -> ``uint8 [rows, row_bytes]``.

        Raises:
            ValueError: no floating-point matrix, or a value is NaN or infinite.
        """
        in_features = weight.shape[-1] if weight.dim() else 0
        pad = align_to_4_bytes(in_features) - in_features

        def quantize_chunk(groups: Tensor, first_row: int) -> Sequence[Tensor]:
            absmax = groups.abs().amax(dim=-1)
            check_finite_statistics(absmax, in_features, first_row)
            factor = torch.where(absmax > 0, 127.0 / absmax.double(), 0.0).float()
            codes = _round_to_bytes(groups * factor.unsqueeze(-1)).flatten(1)[:, :in_features]
            return codes, codes.new_zeros(len(codes), pad), absmax

        size = align_to_4_bytes(in_features) or 4
        return quantize_in_groups(weight, size, self.num_row_bytes(in_features), quantize_chunk)

    @property
    def int8_rows(self) -> Self:
        """The codec itself."""
        return self

    def split_packed_rows(self, packed: Tensor, in_features: int) -> tuple[Tensor, Tensor]:
        """Codes ``int8 [rows, in]`` (a view) and largest magnitudes ``float32 [rows]``."""
        check_packed_rows(packed, self.num_row_bytes(in_features), self.name, in_features)
        absmax = self.read_statistics(packed, in_features)
        return packed[:, :in_features].view(torch.int8), absmax.flatten()

    @property
    def grid_rows(self) -> Self:
        """The codec itself."""
        return self

    @property
    def code_bits(self) -> int:
        """8."""
        return 8

    def encode_on_grid(self, values: Tensor, kept: Tensor, in_features: int) -> Tensor:
        """Return ``values`` in codes on the magnitudes of ``kept``."""
        return encode_nearest_on_grid(
            values,
            kept,
            self.read_statistics(kept, in_features) * _INVERSE,
            in_features,
            _round_to_bytes,
            bits=8,
            group_size=max(1, in_features),
        )

    def dequantize_rows(self, packed: Tensor, in_features: int, dtype: torch.dtype) -> Tensor:
        """``uint8 [rows, row_bytes]`` -> ``dtype [rows, in]``."""
        check_packed_rows(packed, self.num_row_bytes(in_features), self.name, in_features)
        absmax = self.read_statistics(packed, in_features)
        weight = torch.empty(len(packed), in_features, dtype=dtype, device=packed.device)
        if not weight.numel():
            return weight
        codes = packed[:, :in_features].view(torch.int8)
        for span in list_row_chunks(len(packed), in_features, packed.device):
            numbers = codes[span.slice].float().mul_(absmax[span.slice]).mul_(_INVERSE)
            weight[span.slice] = numbers
        return weight


def _round_to_bytes(scaled: Tensor) -> Tensor:
    """The nearest signed bytes, without -128, of float32 values, which are written to, as
    ``uint8``, same shape."""
    return scaled.round_().clamp_(-127, 127).to(torch.int8).view(torch.uint8)
