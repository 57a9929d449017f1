"""Orders of columns; decoding with them is in ``test_integer.py``."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from dist_peft.core.errors import UserError
from dist_peft.model.prequantized.column_order import choose_ordered_codec
from dist_peft.quant.affine import AffineCodec
from dist_peft.quant.codec import Codec
from dist_peft.quant.ordered_columns import OrderedColumnsCodec
from dist_peft.store.index import SafetensorsIndex
from tests.support import packed

CODEC = AffineCodec(4, 8)


def choose(groups: Tensor, directory: Path) -> Codec:
    packed.save({"a.g_idx": groups}, directory)
    return choose_ordered_codec(SafetensorsIndex.open(directory), "a.g_idx", CODEC, 24, 8)


def test_natural_groups_need_no_order(tmp_path: Path) -> None:
    assert choose(torch.arange(24) // 8, tmp_path) is CODEC


def test_columns_of_a_group_keep_their_order(tmp_path: Path) -> None:
    groups = torch.tensor([2, 0, 1] * 8, dtype=torch.int32)
    order = torch.tensor([*range(1, 24, 3), *range(2, 24, 3), *range(0, 24, 3)])
    assert choose(groups, tmp_path) == OrderedColumnsCodec.from_order(CODEC, order)


@pytest.mark.parametrize("groups", [[0] * 24, [-1] * 8 + [1] * 8 + [2] * 8, [5] * 24])
def test_groups_of_other_sizes_are_refused(groups: list[int], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.g_idx .* does not put 8 columns into each group"):
        choose(torch.tensor(groups), tmp_path)
