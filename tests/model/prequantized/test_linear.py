import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dist_peft.core.errors import UserError
from dist_peft.core.span import Span
from dist_peft.model.prequantized.linear import (
    PackedLinear,
    ScaleRounding,
    count_whole_groups,
    require_tensor,
)
from dist_peft.quant.affine import AffineCodec
from dist_peft.store.index import SafetensorsIndex
from dist_peft.store.reader import RowReader
from tests.support import packed

CODEC = AffineCodec(4, 16)


class Fixed(PackedLinear):
    """Rows that are not read from anywhere."""

    def _read_packed(self, reader: RowReader, span: Span) -> Tensor:
        if span.start == 3:
            raise ValueError("too deep")
        return CODEC.quantize_to_packed(torch.ones(len(span), 32))


def test_read(tmp_path: Path) -> None:
    packed.save({"w": torch.zeros(2)}, tmp_path)
    linear = Fixed("a.b", 8, 32, CODEC)
    with RowReader(SafetensorsIndex.open(tmp_path)) as reader:
        assert torch.equal(
            linear.read_packed_rows(reader, Span(0, 2)), CODEC.quantize_to_packed(torch.ones(2, 32))
        )
        assert linear.read_packed_rows(reader, Span(3, 3)).shape == (0, CODEC.num_row_bytes(32))
        with pytest.raises(UserError, match=r"a\.b in rows 3 to 4: too deep"):
            linear.read_packed_rows(reader, Span(3, 5))


def test_rounding_keeps_the_worst() -> None:
    rounding = ScaleRounding()
    for value in (1.0, 1 + 2.0**-12, 1.0):
        rounding.round_scale(torch.full((1, 1), value))
    assert rounding.worst == pytest.approx(2.0**-12, rel=1e-3)
    assert copy.deepcopy(rounding) is rounding


def test_need(tmp_path: Path) -> None:
    packed.save({"w": torch.zeros(2, 3)}, tmp_path)
    index = SafetensorsIndex.open(tmp_path)
    assert require_tensor(index, "w", (2, 3), (torch.float16, torch.float32)).shape == (2, 3)
    with pytest.raises(UserError, match=r"no v: it is incomplete"):
        require_tensor(index, "v", (2, 3), (torch.float32,))
    with pytest.raises(UserError, match=r"w .* is float32 \[2, 3\], .* it is int32 \[2, 4\]"):
        require_tensor(index, "w", (2, 4), (torch.int32,))


def test_whole_groups() -> None:
    assert count_whole_groups("a", 96, 32) == 3
    with pytest.raises(UserError, match="a has 96 in_features, which groups of 64 do not divide"):
        count_whole_groups("a", 96, 64)
