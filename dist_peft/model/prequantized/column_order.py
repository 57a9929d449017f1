"""Columns that are in groups in another order than theirs: GPTQ's act-order, ``g_idx``.

``g_idx[c]`` is the group of column ``c``, the same for all rows, read whole by each rank when the
model is built: 4 bytes a column, of which a row has ``bits``/8 each.
"""

import torch

from dist_peft.core.errors import UserError
from dist_peft.model.prequantized.linear import UNQUANTIZED_HINT
from dist_peft.quant.affine import AffineCodec
from dist_peft.quant.codec import Codec
from dist_peft.quant.ordered_columns import OrderedColumnsCodec
from dist_peft.store.index import SafetensorsIndex
from dist_peft.store.reader import RowReader

__all__ = ["choose_ordered_codec"]


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
