"""NVFP4 decoded from its description, and loaded by compressed-tensors."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dist_peft.core.config.run import QuantConfig
from dist_peft.core.errors import UserError
from dist_peft.export.formats.nvfp4_format import share_divisor
from dist_peft.export.formats.registry import export_model
from dist_peft.quant.e2m1 import E2M1_LEVELS
from tests.support.export_runs import (
    make_run,
    mark_as_trained_through,
    mixture,
    read_trained_rows,
)


def test_a_common_divisor_is_exact_but_for_scales_below_e4m3() -> None:
    scale = torch.tensor([[448.0, 0.5], [300.0, 2.0]]).to(torch.float8_e4m3fn)
    divisor = torch.tensor([[2.0**-3], [2.0**2]])
    shared, least, is_exact = share_divisor(scale, divisor)
    assert is_exact and least.tolist() == [2.0**-3]
    assert torch.equal(shared.float() / least, scale.float() / divisor)
    assert share_divisor(scale, torch.full((2, 1), 0.3))[1:] == (torch.tensor([0.3]), True)
    assert not share_divisor(scale, torch.tensor([[2.0**-10], [2.0**2]]))[2]


def test_merged_models_are_loaded_by_compressed_tensors(tmp_path: Path) -> None:
    run = make_run(tmp_path, None)
    exported = export_model("nvfp4", run.job(tmp_path / "out"))
    assert exported.written.packed == 14
    assert run.verify("nvfp4", exported)[1].relative < 1
    how = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert how["format"] == "nvfp4-pack-quantized"


def test_experts_are_divided_where_transformers_leaves_the_divisor_out(tmp_path: Path) -> None:
    """Then the logits are the trained ones; decompressed by the library itself, tensors are near
    the merged weights."""
    compressors = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    run = make_run(tmp_path, None, config=mixture("qwen3_moe"))
    exported = export_model("nvfp4", run.job(tmp_path / "out"))
    assert exported.written.packed == 2 * (4 + 3 * 4)
    consumer, found = run.verify("nvfp4", exported)
    assert found.relative < 1 and "experts divided by weight_global_scale" in consumer
    how = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    weights = how["config_groups"]["group_0"]["weights"]
    scheme = quantization.QuantizationScheme(
        targets=["Linear"], weights=quantization.QuantizationArgs(**weights)
    )
    compressor = compressors.BaseCompressor.get_value_from_registry("nvfp4-pack-quantized")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    stacks = run.trained["model.layers.1.mlp.experts.down_proj"]
    for expert, wanted in enumerate(stacks):
        stem = f"model.layers.1.mlp.experts.{expert}.down_proj."
        own = {n.removeprefix(stem): t for n, t in tensors.items() if n.startswith(stem)}
        found = compressor.decompress(own, scheme)["weight"].float()
        assert float((found - wanted).abs().mean()) < 0.12 * float(wanted.abs().mean())


def test_trained_codes(tmp_path: Path) -> None:
    """Decoded as the format says they are the weights of training, bit for bit."""
    run = make_run(tmp_path, QuantConfig(kind="nvfp4"))
    mark_as_trained_through(run)
    assert export_model("nvfp4", run.job(tmp_path / "out", trained_codes=True)).exact
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for name, wanted in read_trained_rows(run).items():
        stem = name.removesuffix("weight")
        codes = tensors[f"{stem}weight_packed"]
        levels = torch.tensor(E2M1_LEVELS)[torch.stack((codes & 15, codes >> 4), -1).long()]
        divisor = tensors[f"{stem}weight_global_scale"]
        scale = tensors[f"{stem}weight_scale"].float() / divisor
        dense = levels.flatten(1).unflatten(1, (-1, 16)) * scale.unsqueeze(-1)
        assert torch.equal(dense.flatten(1), wanted)
    run.base = run.base.model_copy(update={"quant": QuantConfig()})
    with pytest.raises(UserError, match=r"keeps codes of base\.quant\.kind nvfp4"):
        export_model("nvfp4", run.job(tmp_path / "nf4", trained_codes=True))
