"""Tensors of mlx and hf-metal, taken apart by hand."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dist_peft.core.config.run import QuantConfig
from dist_peft.export.formats.float_bias import find_stored_group_size
from dist_peft.export.formats.registry import export_model
from tests.support.export_runs import make_run
from tests.support.packed import unpack


@pytest.mark.parametrize(
    ("name", "bias", "bits", "stored"),
    [("mlx", "biases", 3, 3), ("hf-metal", "qbiases", 3, 4), ("mlx", "biases", 2, 2)],
)
def test_folded_adapter_is_all_there(
    name: str, bias: str, bits: int, stored: int, tmp_path: Path
) -> None:
    quant = QuantConfig(kind="int", bits=bits, group_size=32)
    run = make_run(tmp_path, quant, group=32, dtype="bfloat16")
    exported = export_model(name, run.job(tmp_path / "out", pooled=True))
    assert exported.written.packed == exported.written.merged == 14
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for path, weight in run.trained.items():
        stem = path.removesuffix(".weight")
        if f"{stem}.scales" not in tensors:
            assert tensors[path].dtype == torch.float32 and torch.equal(tensors[path], weight)
            continue
        scale, shift = tensors[f"{stem}.scales"], tensors[f"{stem}.{bias}"]
        assert scale.dtype == shift.dtype == torch.float32
        codes = unpack(tensors[path], stored).view(*scale.shape, 32)
        found = (codes * scale.unsqueeze(-1) + shift.unsqueeze(-1)).flatten(1)
        torch.testing.assert_close(found, weight, rtol=1e-5, atol=1e-6)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    if name == "mlx":
        assert config["quantization"] == {"group_size": 32, "bits": bits, "mode": "affine"}
    else:
        how = config["quantization_config"]
        assert (how["bits"], how["group_size"]) == (4, 32)
        assert how["modules_to_not_convert"] == ["lm_head"]
        assert config["dtype"] == "float32"  # a loader that casts scales would lose the adapter


def test_stored_group() -> None:
    assert [find_stored_group_size(g, (32, 64, 128)) for g in (32, 96, 64, 256, 16, 40)] == [
        32,
        32,
        64,
        128,
        0,
        0,
    ]
