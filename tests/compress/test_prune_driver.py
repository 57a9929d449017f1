"""Pruned rows keep the type of the files; masks are tested in ``tests/app/test_pruning.py``."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from dist_peft.core.world import World
from tests.support.pruning_runs import make_pruning_tree, write_pruned


def test_float32_files_computed_in_bfloat16_lose_no_bit(tmp_path: Path) -> None:
    tree = make_pruning_tree(tmp_path)
    tree["base"]["compute_dtype"] = "bfloat16"
    base = load_file(tmp_path / "base" / "model.safetensors")
    found = write_pruned(World(), tree, tmp_path / "out", "wanda", "0.5")
    assert found.keys() == base.keys()
    for name, weight in found.items():
        left = weight != 0
        assert weight.dtype == torch.float32 and torch.equal(weight[left], base[name][left])


def test_bfloat16_files_stay_bfloat16(tmp_path: Path) -> None:
    tree = make_pruning_tree(tmp_path)
    file = tmp_path / "base" / "model.safetensors"
    save_file({k: v.bfloat16() for k, v in load_file(file).items()}, file, {"format": "pt"})
    found = write_pruned(World(), tree, tmp_path / "out", "sparsegpt", "2:4")
    assert {weight.dtype for weight in found.values()} == {torch.bfloat16}
    pruned = [w for name, w in found.items() if name.endswith("_proj.weight")]
    assert len(pruned) == 14
    assert all(bool(((w.view(-1, 4) == 0).sum(1) >= 2).all()) for w in pruned)
