"""Rows are written over time, and the directory appears as a whole."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dist_peft.store.staged_model import StagedModel
from dist_peft.store.writer import TensorSpec

SPECS = [TensorSpec("a", torch.float32, (3, 2))]


def test_it_appears_when_it_is_published(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with StagedModel(out, SPECS) as staged:
        staged.write_rows("a", torch.ones(2, 2), 1)
        staged.write_rows("a", torch.zeros(1, 2))
        (staged.directory / "config.json").write_text("{}")
        assert not out.exists()
        staged.publish()
        assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors"]
    assert load_file(out / "model.safetensors")["a"].sum() == 4
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_nothing_is_left_without_every_row(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="2 of 3 rows"),
        StagedModel(tmp_path / "x", SPECS) as staged,
    ):
        staged.write_rows("a", torch.ones(1, 2))
    with pytest.raises(KeyboardInterrupt), StagedModel(tmp_path / "x", SPECS):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
