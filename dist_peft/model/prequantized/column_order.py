"""Columns that are in groups in another order than theirs: GPTQ's act-order, ``g_idx``.

``g_idx[c]`` is the group of column ``c``, the same for all rows, read whole by each rank when the
model is built: 4 bytes a column, of which a row has ``bits``/8 each.

The weights of a mixture's experts have an order each. Where orders of a stack differ, its rows name
theirs (``quant.ordered_stacks``).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_peft.core.errors import UserError
from dist_peft.core.span import Span
from dist_peft.model.prequantized.linear import UNQUANTIZED_HINT, PackedLinear
from dist_peft.quant.affine import AffineCodec
from dist_peft.quant.codec import Codec
from dist_peft.quant.ordered_columns import OrderedColumnsCodec
from dist_peft.quant.ordered_stacks import OrderedStackCodec
from dist_peft.store.index import SafetensorsIndex
from dist_peft.store.reader import RowReader

__all__ = ["MarkedLinear", "choose_ordered_codec", "share_stack_codec"]


@dataclass(frozen=True)
class MarkedLinear:
    """One expert's weight in a stack whose orders of columns differ.

    Attributes:
        linear: reads its rows, in its own order.
        codec: of the stack.
        number: of its order.
    """

    linear: PackedLinear
    codec: OrderedStackCodec
    number: int

    @property
    def has_middle_zeros(self) -> bool:
        """That of ``linear``."""
        return self.linear.has_middle_zeros

    def read_packed_rows(self, reader: RowReader, span: Span) -> Tensor:
        """Read rows of the stack's codec, ``uint8 [len(span), row_bytes]``."""
        return self.codec.mark_rows(self.linear.read_packed_rows(reader, span), self.number)


def share_stack_codec(linears: Sequence[PackedLinear]) -> Sequence[PackedLinear | MarkedLinear]:
    """Return readers of the weights of a stack with one codec, where only orders differ; else
    ``linears``."""
    ordered = [linear.codec.ordered_rows for linear in linears]
    inner = {
        linear.codec if rows is None else rows.inner
        for linear, rows in zip(linears, ordered, strict=True)
    }
    if len({linear.codec for linear in linears}) <= 1 or len(inner) > 1 or not any(ordered):
        return linears
    found = next(rows for rows in ordered if rows).inner
    natural = torch.arange(linears[0].in_features) // found.group_size
    orders = [
        (natural if rows is None else rows.list_column_groups()).argsort(stable=True)
        for rows in ordered
    ]
    keys = [tuple(order.tolist()) for order in orders]
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    codec = OrderedStackCodec.from_orders(found, [torch.tensor(key) for key in numbers])
    return [
        MarkedLinear(linear, codec, numbers[key]) for linear, key in zip(linears, keys, strict=True)
    ]


def choose_ordered_codec(
    index: SafetensorsIndex, name: str, codec: AffineCodec, columns: int, group_size: int
) -> Codec:
    """Return the codec of columns whose groups the tensor ``name`` has: ``codec`` where they are
    the natural ones.

    Raises:
        UserError: a group has not ``group_size`` columns.
    """
    with RowReader(index) as reader:
        groups = reader.read_rows(name).long()
    if torch.equal(groups, torch.arange(columns) // group_size):
        return codec
    counts = groups.clamp(0, columns).bincount(minlength=columns // group_size)
    if int(groups.min()) < 0 or counts.tolist() != [group_size] * (columns // group_size):
        raise UserError(
            f"tensor {name} in {index.path} does not put {group_size} columns into each group; "
            f"{UNQUANTIZED_HINT}"
        )
    return OrderedColumnsCodec.from_order(codec, groups.argsort(stable=True))
