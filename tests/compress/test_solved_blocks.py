"""Solved blocks on disk: what is taken back, and what is solved again."""

from pathlib import Path

import pytest
import torch
from torch import nn

from dist_peft.compress.solved_blocks import SolvedBlocks
from dist_peft.core.config.run import QuantConfig
from dist_peft.core.errors import UserError
from dist_peft.core.world import World
from dist_peft.engine.single import SingleEngine
from dist_peft.model.frozen_linear import FrozenLinear
from dist_peft.quant.codec import make_codec

CPU = torch.device("cpu")
ENGINE = SingleEngine(CPU)
CODEC = make_codec(QuantConfig(kind="int", bits=3, group_size=16), torch.float32)


def make_block(value: int) -> nn.Module:
    """Two linears whose packed bytes all are ``value``."""
    block = nn.ModuleDict()
    for name, rows in (("q", 6), ("k", 3)):
        linear = FrozenLinear(32, rows, CODEC, False, torch.float32, f"{name}.weight", CPU)
        linear.packed.data.fill_(value)
        block[name] = linear
    return block


def kept(tmp_path: Path, **inputs: object) -> SolvedBlocks:
    return SolvedBlocks(tmp_path / "out", {"seed": 0, **inputs}, World())


def test_solved_block_is_restored(tmp_path: Path) -> None:
    kept(tmp_path).save_block(0, make_block(7), ENGINE)
    block = make_block(0)
    assert kept(tmp_path).restore_block(0, block, ENGINE)
    assert all(bool((linear.packed == 7).all()) for linear in block.values())
    assert not kept(tmp_path).restore_block(1, block, ENGINE)


@pytest.mark.parametrize("damage", ["cut", "altered", "other tensors"])
def test_damaged_block_is_solved_again(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept(tmp_path).save_block(0, make_block(7), ENGINE)
    (file,) = tmp_path.glob(".out.solved-*/block-00000.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    block = make_block(0)
    if damage == "other tensors":
        del block["k"]
    else:
        file.write_bytes(data[:-5] if damage == "cut" else data)
    assert not kept(tmp_path).restore_block(0, block, ENGINE)
    assert "block-00000.safetensors is damaged" in caplog.text
    assert all(bool((linear.packed == 0).all()) for linear in block.values())


def test_solve_with_other_inputs_starts_again(tmp_path: Path) -> None:
    kept(tmp_path).save_block(0, make_block(7), ENGINE)
    (before,) = tmp_path.glob(".out.*")
    other = kept(tmp_path, seed=1)
    assert not before.exists()
    assert not other.restore_block(0, make_block(0), ENGINE)
    other.remove()
    assert not list(tmp_path.glob(".out.*"))


def test_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*/file/\.out\.solved-"):
        SolvedBlocks(tmp_path / "file" / "out", {}, World())
