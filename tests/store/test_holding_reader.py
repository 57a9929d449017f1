"""Columns in parts, each tensor read once."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dist_peft.core.span import Span
from dist_peft.store.holding_reader import HoldingReader
from dist_peft.store.index import SafetensorsIndex
from dist_peft.store.reader import RowReader


def test_all_columns_in_turn_are_one_pass(tmp_path: Path) -> None:
    whole = torch.arange(6 * 10, dtype=torch.int32).reshape(6, 10)
    save_file({"w": whole, "v": torch.zeros(3)}, tmp_path / "model.safetensors")
    with RowReader(SafetensorsIndex.open(tmp_path)) as reader:
        holding = HoldingReader(reader)
        for columns in Span(0, 10).split_into_chunks(3):
            assert torch.equal(holding.read_rows("w", columns=columns), whole[:, columns.slice])
            part = holding.read_rows("w", Span(1, 4), columns)
            assert torch.equal(part, whole[1:4, columns.slice])
        assert reader.bytes_read == whole.nbytes
        assert torch.equal(holding.read_rows("w", Span(2, 3)), whole[2:3])  # whole rows: not kept
        assert torch.equal(holding.read_flat_rows("w", Span(2, 3)), whole[2:3])
        assert reader.bytes_read == whole.nbytes + 2 * 40
        for name in ("w", "v"):
            with pytest.raises(ValueError, match="no columns"):
                holding.read_rows(name, columns=Span(0, 11))
