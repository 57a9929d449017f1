"""Rows of a mixture's experts, each expert with an order of columns of its own (act-order).

GPTQ quantizes every expert on the tokens that it got, so that its columns are in groups in an order
of its own (``quant.ordered_columns`` has one for all rows). A stack has the rows of all experts,
and is cut, gathered, sent and decoded anywhere, by calls that do not know whose rows they have. So
each row names its order::

    | row with sorted columns (quant.affine) | number of its order, uint32 |

    decoded   w[c] = sorted[positions[number][c]]

That is 4 bytes a row. The orders are the codec's, 4 bytes for each column of each
*different* order (gate and up of an expert usually share one, as they read the same input), on
every rank. The other way, columns of the inputs sorted for each expert at its product, would make
every product, adapter and merge know of orders; here a decode alone does, and what it returns has
the weight's own columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from dist_peft.quant.affine import AffineCodec, AffineParts
from dist_peft.quant.codec_defaults import CodecDefaults
from dist_peft.quant.packed_rows import (
    check_packed_rows,
    list_row_chunks,
    read_packed_field,
    view_as_bytes,
)
from dist_peft.quant.table_cache import cache_tables

__all__ = ["OrderedStackCodec"]

_NUMBER_BYTES = 4


@dataclass(frozen=True)
class OrderedStackCodec(CodecDefaults):
    """Integer rows that name the order of their columns. See the module.

    Attributes:
        inner: of the sorted columns.
        orders: which column of the weight each sorted one is, int32 ``[in]`` as bytes each.
    """

    inner: AffineCodec
    orders: tuple[bytes, ...]
    codec_version: ClassVar[int] = 1

    @classmethod
    def from_orders(cls, inner: AffineCodec, orders: Sequence[Tensor]) -> Self:
        """Build from permutations ``[in]``."""
        return cls(inner, tuple(order.to(torch.int32).numpy().tobytes() for order in orders))

    def __repr__(self) -> str:
        columns = len(self.orders[0]) // 4
        return f"{type(self).__name__}({self.inner!r}, {len(self.orders)} orders of {columns})"

    @property
    def name(self) -> str:
        return self.inner.name

    def describe_storage(self) -> str:
        """Return type, bits and groups."""
        return f"{self.inner.describe_storage()}, columns in act-order of each expert"

    def read_statistics(self, packed: Tensor, in_features: int) -> Tensor:
        """Return all scales and zeros of packed rows."""
        return self.inner.read_statistics(packed[:, :-_NUMBER_BYTES], in_features)

    def num_row_bytes(self, in_features: int) -> int:
        """Bytes of a packed row; a multiple of 4."""
        return self.inner.num_row_bytes(in_features) + _NUMBER_BYTES

    def quantize_to_packed(self, weight: Tensor) -> Tensor:
        """Raise ValueError: rows of a weight do not say whose order is theirs."""
        raise ValueError("rows in act-order of each expert are read and not encoded")

    def mark_rows(self, packed: Tensor, number: int) -> Tensor:
        """Rows of ``inner`` with sorted columns -> rows of this codec, in the order ``number``."""
        assert 0 <= number < len(self.orders), number
        mark = torch.full((len(packed), 1), number, dtype=torch.int32, device=packed.device)
        return torch.cat((packed, view_as_bytes(mark)), 1)

    @property
    def ordered_rows(self) -> Self:
        """The codec itself."""
        return self

    def list_column_groups(self, packed: Tensor | None = None) -> Tensor:
        """Return the group of each column of the weight whose rows are given, ``int32 [in]``."""
        assert packed is not None and len(packed), "of which order?"
        return (self._read_positions(packed[:1])[0] // self.inner.group_size).to(torch.int32)

    def split_packed_rows(self, packed: Tensor, in_features: int) -> AffineParts:
        """Return codes in the weight's order, scales and zeros of groups."""
        parts = self.inner.split_packed_rows(packed[:, :-_NUMBER_BYTES], in_features)
        return parts._replace(codes=parts.codes.gather(1, self._read_positions(packed)))

    @property
    def grid_rows(self) -> Self:
        """The codec itself."""
        return self

    @property
    def code_bits(self) -> int:
        """Bits of a code."""
        return self.inner.bits

    def encode_on_grid(self, values: Tensor, kept: Tensor, in_features: int) -> Tensor:
        """Return ``values`` in codes on the scales and zeros of ``kept``, in its orders."""
        positions = self._read_positions(kept)
        ordered = torch.empty_like(values).scatter_(1, positions, values)
        own, marks = kept[:, :-_NUMBER_BYTES], kept[:, -_NUMBER_BYTES:]
        return torch.cat((self.inner.encode_on_grid(ordered, own, in_features), marks), 1)

    def _read_positions(self, packed: Tensor) -> Tensor:
        """Place of each column of the weight among the sorted ones, ``int64 [rows, in]``."""
        numbers = read_packed_field(packed, packed.shape[1] - _NUMBER_BYTES, 1, torch.int32)
        positions = _build_positions(self.orders, packed.device)
        return positions.index_select(0, numbers.flatten()).long()

    def dequantize_rows(self, packed: Tensor, in_features: int, dtype: torch.dtype) -> Tensor:
        """``uint8 [rows, row_bytes]`` -> ``dtype [rows, in]``, in the weight's order."""
        check_packed_rows(packed, self.num_row_bytes(in_features), self.name, in_features)
        weight = self.inner.dequantize_rows(packed[:, :-_NUMBER_BYTES], in_features, dtype)
        result = torch.empty_like(weight)
        for span in list_row_chunks(len(packed), in_features, packed.device):
            own = self._read_positions(packed[span.slice])
            torch.gather(weight[span.slice], 1, own, out=result[span.slice])
        return result


@cache_tables
def _build_positions(orders: tuple[bytes, ...], device: torch.device) -> Tensor:
    """The inverse of each order, ``int32 [orders, in]``."""
    wanted = torch.stack([torch.frombuffer(bytearray(o), dtype=torch.int32) for o in orders])
    return wanted.argsort(1).to(device, torch.int32)
