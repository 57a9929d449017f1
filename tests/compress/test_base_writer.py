"""A changed base appears whole or not at all."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dist_peft.compress.base_writer import copy_base_tensors, open_base_writer
from dist_peft.core.world import World
from dist_peft.store.index import SafetensorsIndex
from dist_peft.store.writer import TensorSpec
from tests.support.tiny_runs import save_base


def write_copy(directory: Path, fails: bool) -> None:
    index = SafetensorsIndex.open(directory / "base")
    name = "model.norm.weight"
    specs = [
        TensorSpec("other" if info.name == name else info.name, info.dtype, info.shape)
        for info in index.tensors.values()
        if "layers" not in info.name
    ]
    left_out = {info for info in index.tensors if "layers" in info}
    with open_base_writer(specs, directory / "out", World()) as writer:
        assert writer is not None
        copy_base_tensors(index, left_out, writer, {name: "other"})
        if fails:
            raise RuntimeError
        writer.publish()


@pytest.mark.parametrize("fails", [False, True])
def test_copied_or_nothing(fails: bool, tmp_path: Path) -> None:
    base = load_file(save_base(tmp_path / "base") / "model.safetensors")
    if fails:
        with pytest.raises(RuntimeError):
            write_copy(tmp_path, fails)
        assert not (tmp_path / "out").exists()
    else:
        write_copy(tmp_path, fails)
        found = load_file(tmp_path / "out" / "model.safetensors")
        assert torch.equal(found.pop("other"), base["model.norm.weight"])
        assert all("layers" not in name and torch.equal(base[name], found[name]) for name in found)
    assert not list(tmp_path.glob(".*"))
