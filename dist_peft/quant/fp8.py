"""FP8 (E4M3) with a float32 scale for each group of a row.

A group of ``group_size`` weights of a row shares a scale::

    s    = max |w_i| / 448                  1 for a group of zeros
    c_i  = E4M3 nearest to w_i / s          4 bits of exponent, 3 of mantissa, largest 448
    w'_i = c_i * s                          one float32 product, then rounded to the wanted type

Unlike integers the steps are in proportion to the weight: small weights of a group with a large one
keep three bits of mantissa down to 2**-6 of the scale.

Row layout (``groups = ceil(in / group_size)``; the last group may be shorter)::

    | codes, a byte each | 0 pad | scale float32 per group |
    ^ in bytes, to a multiple of 4

Files of other libraries have a scale for a tile of 128 x 128 weights (DeepSeek-V3), for a row or
for a tensor. Here every row has its own copies, 4 bytes for 128 weights, so that a rank's rows are
complete wherever they are cut. As all of these decode by the same product, values are equal to
those of ``transformers`` and compressed-tensors, bit for bit.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from dist_peft.core.config.run import QuantConfig
from dist_peft.quant.codec_defaults import CodecDefaults
from dist_peft.quant.device_choice import RowLayout, dequantize_on_device
from dist_peft.quant.kept_grid import encode_nearest_on_grid
from dist_peft.quant.packed_rows import (
    align_to_4_bytes,
    check_finite_statistics,
    check_packed_rows,
    divide_exactly,
    list_row_chunks,
    quantize_in_groups,
    read_packed_field,
    view_as_bytes,
)

__all__ = ["Fp8Codec"]

_LARGEST = 448.0
_SMALLEST_SCALE = 2.0**-126
"""The smallest normal float32: processors may take smaller ones for 0."""


@dataclass(frozen=True)
class Fp8Codec(CodecDefaults):
    """The FP8 codec. See the module for formula and layout.

    Attributes:
        group_size: weights that share a scale; any multiple of 8. 2**16: usually a whole row.
    """

    codec_version: ClassVar[int] = 1
    config_keys: ClassVar[tuple[str, ...]] = ("bits", "group_size")

    group_size: int = 128

    @classmethod
    def from_config(cls, quant: QuantConfig) -> Self:
        """The codec of a ``base.quant`` section with ``kind: fp8``."""
        return cls(quant.group_size)

    def __post_init__(self) -> None:
        if self.group_size < 8 or self.group_size % 8:
            raise ValueError(f"group_size {self.group_size} is not a positive multiple of 8")

    @property
    def name(self) -> str:
        return "fp8"

    def describe_storage(self) -> str:
        """Return kind, bits and group size."""
        return f"fp8, 8 bits in groups of {self.group_size}"

    def count_groups(self, in_features: int) -> int:
        """Return the number of scales of a row."""
        return -(-in_features // self.group_size)

    def read_statistics(self, packed: Tensor, in_features: int) -> Tensor:
        """Return the scales ``float32 [rows, groups]``."""
        groups, start = self.count_groups(in_features), align_to_4_bytes(in_features)
        return read_packed_field(packed, start, groups, torch.float32)

    def num_row_bytes(self, in_features: int) -> int:
        """Bytes of a packed row; a multiple of 4."""
        return align_to_4_bytes(in_features) + 4 * self.count_groups(in_features)

    def quantize_to_packed(self, weight: Tensor) -> Tensor:
        """float ``[rows, in]`` -> ``uint8 [rows, row_bytes]``.

        Raises:
            ValueError: no floating-point matrix, or a value is NaN or infinite.
        """
        in_features = weight.shape[-1] if weight.dim() else 0
        pad = align_to_4_bytes(in_features) - in_features

        def quantize_chunk(groups: Tensor, first_row: int) -> Sequence[Tensor]:
            absmax = groups.abs().amax(dim=-1)
            check_finite_statistics(absmax, self.group_size, first_row)
            scale = divide_exactly(absmax, _LARGEST).clamp_(min=_SMALLEST_SCALE)
            scale = torch.where(absmax > 0, scale, 1.0)
            codes = _round_to_codes(groups / scale.unsqueeze(-1)).flatten(1)[:, :in_features]
            return codes, codes.new_zeros(len(codes), pad), scale

        # a group is no longer than the row: it would only be padded with zeros
        group_size = min(self.group_size, align_to_4_bytes(in_features) or 4)
        return quantize_in_groups(
            weight, group_size, self.num_row_bytes(in_features), quantize_chunk
        )

    def dequantize_rows(self, packed: Tensor, in_features: int, dtype: torch.dtype) -> Tensor:
        """``uint8 [rows, row_bytes]`` -> ``dtype [rows, in]``."""
        described = self._describe_rows(in_features)
        check_packed_rows(packed, described.row_bytes, self.name, in_features)

        def by_torch(some: Tensor) -> Tensor:
            return self._dequantize_by_torch(some, in_features, dtype)

        fused = dequantize_on_device(packed, described, in_features, dtype, by_torch)
        return by_torch(packed) if fused is None else fused

    def _dequantize_by_torch(self, packed: Tensor, in_features: int, dtype: torch.dtype) -> Tensor:
        scale = self.read_statistics(packed, in_features)
        codes = packed[:, :in_features].view(torch.float8_e4m3fn)
        weight = torch.empty(len(packed), in_features, dtype=dtype, device=packed.device)
        if not weight.numel():
            return weight
        whole = in_features // self.group_size * self.group_size
        for span in list_row_chunks(len(packed), in_features, packed.device):
            numbers = codes[span.slice].float()
            own = scale[span.slice].unsqueeze(-1)
            if whole:
                by_group = numbers[:, :whole].unflatten(1, (-1, self.group_size))
                by_group.mul_(own[:, : whole // self.group_size])
            if whole < in_features:
                numbers[:, whole:].mul_(own[:, -1])
            weight[span.slice] = numbers
        return weight

    @property
    def fp8_rows(self) -> Self:
        """The codec itself."""
        return self

    def split_packed_rows(self, packed: Tensor, in_features: int) -> tuple[Tensor, Tensor]:
        """Codes ``float8_e4m3fn [rows, in]`` (a view) and scales ``float32 [rows, groups]``."""
        check_packed_rows(packed, self.num_row_bytes(in_features), self.name, in_features)
        scale = self.read_statistics(packed, in_features)
        return packed[:, :in_features].view(torch.float8_e4m3fn), scale

    @property
    def grid_rows(self) -> Self:
        """The codec itself."""
        return self

    @property
    def code_bits(self) -> int:
        """8."""
        return 8

    def encode_on_grid(self, values: Tensor, kept: Tensor, in_features: int) -> Tensor:
        """Return ``values`` in codes on the scales of ``kept``."""
        scale = self.read_statistics(kept, in_features)
        return encode_nearest_on_grid(
            values,
            kept,
            scale,
            in_features,
            _round_to_codes,
            bits=8,
            zero_mask=0x7F,
            group_size=self.group_size,
        )

    def _describe_rows(self, in_features: int) -> RowLayout:
        return RowLayout(
            bits=8,
            group_size=self.group_size,
            groups=self.count_groups(in_features),
            scales=align_to_4_bytes(in_features),
            runs=0,
            row_bytes=self.num_row_bytes(in_features),
            kind="fp8",
        )

    def join_packed_rows(self, codes: Tensor, scale: Tensor) -> Tensor:
        """Codes and scales of another library -> packed rows.

        Args:
            codes: ``float8_e4m3fn [rows, in]``.
            scale: ``[rows, groups]``, of any float type that float32 holds.

        Returns:
            ``uint8 [rows, row_bytes]``.

        Raises:
            ValueError: a code is NaN.
        """
        stored = codes.view(torch.uint8)
        lost = (stored & 0x7F) == 0x7F
        if bool(lost.any()):
            row, column = (int(i) for i in lost.nonzero()[0])
            raise ValueError(f"weight is not finite: NaN in row {row}, column {column}")
        in_features = codes.shape[1]
        pad = stored.new_zeros(len(stored), align_to_4_bytes(in_features) - in_features)
        packed = torch.cat((stored, pad, view_as_bytes(scale.float())), 1)
        check_packed_rows(packed, self.num_row_bytes(in_features), self.name, in_features)
        return packed


def _round_to_codes(scaled: Tensor) -> Tensor:
    """The nearest E4M3 numbers of float32 values, which are written to: ``uint8``, same shape."""
    return scaled.clamp_(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn).view(torch.uint8)
