"""Rows whose columns are in another order than the weight's, so that groups are next to each other.

GPTQ with act-order puts columns into groups by their importance. ``g_idx[c]`` is the group of
column ``c``, the same for all rows, so that decoding stays row-local::

    packed row      columns sorted by group, in their order within one
    decoded row     w[c] = sorted[position of c]

The order is the codec's, 4 bytes a column of one linear, on every rank; rows hold none of it.
"""

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from dist_peft.quant.affine import AffineCodec, AffineParts
from dist_peft.quant.codec_defaults import CodecDefaults
from dist_peft.quant.pack import pack_bits, unpack_bits
from dist_peft.quant.table_cache import cache_tables

__all__ = ["OrderedColumnsCodec"]


@dataclass(frozen=True)
class OrderedColumnsCodec(CodecDefaults):
    """Integer rows with columns in another order. See the module.

    Attributes:
        inner: of the sorted columns.
        order: which column of the weight each sorted one is, int32 as bytes (codecs are hashable).
    """

    inner: AffineCodec
    order: bytes
    codec_version: ClassVar[int] = 1

    @classmethod
    def from_order(cls, inner: AffineCodec, order: Tensor) -> Self:
        """Build from ``order``, a permutation ``[in]``."""
        return cls(inner, order.to(torch.int32).numpy().tobytes())

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.inner!r}, {len(self.order) // 4} columns)"

    @property
    def name(self) -> str:
        return self.inner.name

    def describe_storage(self) -> str:
        """Return type, bits and groups."""
        return f"{self.inner.describe_storage()}, columns in act-order"

    def read_statistics(self, packed: Tensor, in_features: int) -> Tensor:
        """Return all scales and zeros of packed rows."""
        return self.inner.read_statistics(packed, in_features)

    def num_row_bytes(self, in_features: int) -> int:
        """Bytes of a packed row; a multiple of 4."""
        return self.inner.num_row_bytes(in_features)

    def quantize_to_packed(self, weight: Tensor) -> Tensor:
        """float ``[rows, in]`` -> ``uint8 [rows, row_bytes]``, in the groups of the order."""
        order, _ = _build_orders(self.order, weight.device)
        return self.inner.quantize_to_packed(weight[:, order])

    def sort_columns(self, packed: Tensor, in_features: int) -> Tensor:
        """Rows of ``inner`` whose codes are in the weight's order -> rows of this codec."""
        order, _ = _build_orders(self.order, packed.device)
        payload, bits = in_features * self.inner.bits // 8, self.inner.bits
        codes = unpack_bits(packed[:, :payload].contiguous(), bits)
        return torch.cat((pack_bits(codes[:, order], bits), packed[:, payload:]), 1)

    @property
    def ordered_rows(self) -> Self:
        """The codec itself."""
        return self

    def list_column_groups(self, packed: Tensor | None = None) -> Tensor:
        """Return the group of each column of the weight, ``int32 [in]``."""
        _, positions = _build_orders(self.order, torch.device("cpu"))
        return (positions // self.inner.group_size).to(torch.int32)

    def split_packed_rows(self, packed: Tensor, in_features: int) -> AffineParts:
        """Return codes in the weight's order, scales and zeros of groups."""
        _, positions = _build_orders(self.order, packed.device)
        parts = self.inner.split_packed_rows(packed, in_features)
        return parts._replace(codes=parts.codes[:, positions])

    @property
    def grid_rows(self) -> Self:
        """The codec itself."""
        return self

    @property
    def code_bits(self) -> int:
        """Bits of a code."""
        return self.inner.bits

    def encode_on_grid(self, values: Tensor, kept: Tensor, in_features: int) -> Tensor:
        """Return ``values`` in codes on the scales and zeros of ``kept``."""
        order, _ = _build_orders(self.order, values.device)
        return self.inner.encode_on_grid(values[:, order], kept, in_features)

    def dequantize_rows(self, packed: Tensor, in_features: int, dtype: torch.dtype) -> Tensor:
        """``uint8 [rows, row_bytes]`` -> ``dtype [rows, in]``, in the weight's order."""
        _, positions = _build_orders(self.order, packed.device)
        return self.inner.dequantize_rows(packed, in_features, dtype)[:, positions]


@cache_tables
def _build_orders(order: bytes, device: torch.device) -> tuple[Tensor, Tensor]:
    """The order and its inverse, ``int64 [in]``."""
    wanted = torch.frombuffer(bytearray(order), dtype=torch.int32).long()
    return wanted.to(device), wanted.argsort().to(device)
