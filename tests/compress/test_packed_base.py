"""The packed directory: its tensors and files, all of them or none."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dist_peft.core.errors import UserError
from dist_peft.core.world import World
from dist_peft.quant.affine import AffineCodec
from dist_peft.quant.nf4 import Nf4Codec
from tests.support.quantized_runs import make_gptq_tree
from tests.support.quantized_runs import write_quantized as write


@pytest.fixture
def tree(tmp_path: Path) -> dict[str, Any]:
    return make_gptq_tree(tmp_path)


@pytest.mark.parametrize("solver", ["rtn", "hqq", "nf4"])
def test_directory(solver: str, tree: dict[str, Any], tmp_path: Path) -> None:
    quant = {"kind": "int", "bits": 4, "group_size": 32, "solver": solver}
    if solver == "nf4":
        quant = {"kind": "nf4", "group_size": 32}
    tree["base"]["quant"] = quant
    tensors = write(World(), tree, tmp_path / "out")
    base = load_file(tmp_path / "base" / "model.safetensors")
    codec = Nf4Codec(32) if solver == "nf4" else AffineCodec(4, 32, solver)
    inside = [n for n in base if ".layers." in n and n.endswith("_proj.weight")]
    assert len(inside) == 14
    for name in inside:
        packed = tensors.pop(name.replace(".weight", ".packed"))
        assert torch.equal(packed, codec.quantize_to_packed(base.pop(name)))
    assert tensors.keys() == base.keys()
    assert all(torch.equal(tensors[name], base[name]) for name in base)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    how = config.pop("quantization_config")
    assert how.pop("made_from").keys() == {"base", "fingerprint", "content", "files"}
    assert how == {
        "quant_method": "dist_peft",
        "kind": quant["kind"],
        "bits": 4,
        "group_size": 32,
        "solver": quant.get("solver", "rtn"),
        **({"double_quant": True} if solver == "nf4" else {}),
    }
    assert config == json.loads((tmp_path / "base" / "config.json").read_text())
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert not list(tmp_path.glob(".*"))


def test_failure_leaves_nothing(
    tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **options: object) -> None:
        raise UserError("the disk is full")

    monkeypatch.setattr("dist_peft.compress.packed_base.copy_model_files", full)
    tree["base"]["quant"] = {"kind": "int", "group_size": 32}
    with pytest.raises(UserError, match="the disk is full"):
        write(World(), tree, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("place", ["file/out", "full/out"])
def test_an_unusable_directory_is_told_before_solving(
    place: str, tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    message = "file is a file"
    if place == "full/out":
        monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(total=10, free=9))
        message = r"needs [\d,]+ bytes in all, 9 are free"
    monkeypatch.setattr("dist_peft.app.quantized_base.solve_gptq_codes", None)
    with pytest.raises(UserError, match=message):
        write(World(), tree, tmp_path / place)
    assert not list(tmp_path.glob("full/.*"))
