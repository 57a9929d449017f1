"""GPTQ, decoded from the description of the format."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dist_peft.core.config.run import QuantConfig
from dist_peft.core.errors import UserError
from dist_peft.export.formats.gptq_format import _split_at_block
from dist_peft.export.formats.registry import export_model
from tests.support.export_runs import decode_base, make_run, mixture
from tests.support.packed import unpack


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq(bits: int, tmp_path: Path) -> None:
    """``qweight`` and ``qzeros`` transposed are bit streams; zeros are not less one (v2)."""
    run = make_run(tmp_path, QuantConfig(kind="int", bits=bits, group_size=32))
    export_model("gptq", run.job(tmp_path / "out", chunk_bytes=1))
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for name, weight in decode_base(run).items():
        stem = name.removesuffix(".weight")
        codes = unpack(tensors[f"{stem}.qweight"].T.contiguous(), bits)
        zeros = unpack(tensors[f"{stem}.qzeros"], bits)
        index = tensors[f"{stem}.g_idx"].long()
        scale = tensors[f"{stem}.scales"].float()
        assert torch.equal((codes - zeros.T[:, index]) * scale.T[:, index], weight)
    how = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (how["bits"], how["checkpoint_format"], how["desc_act"]) == (bits, "gptq_v2", False)


def test_what_gptq_leaves_out_is_named_for_its_loaders(tmp_path: Path) -> None:
    quant = QuantConfig(kind="int", bits=4, group_size=32)
    run = make_run(tmp_path, quant, intermediate_size=104)
    export_model("gptq", run.job(tmp_path / "out"))
    how = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    attention = [f"self_attn.{p}_proj" for p in "koqv"]
    assert how["modules_in_block_to_quantize"] == [attention]
    assert r"-:^model\.layers\.1\.mlp\.down_proj$" in how["dynamic"] and len(how["dynamic"]) == 6


def test_experts_have_the_names_of_gptqmodels_linears(tmp_path: Path) -> None:
    """Mixtral's files have others; the router has its own as well. The adapter is merged only."""
    kept = make_run(tmp_path / "kept", QuantConfig(kind="int"), config=mixture("mixtral"))
    with pytest.raises(UserError, match="no adapter of PEFT"):
        export_model("gptq", kept.job(tmp_path / "apart"))
    run = make_run(tmp_path, None, config=mixture("mixtral"))
    settings = {"merge": True, "lossy": True, "bits": 8, "group_size": 32}
    export_model("gptq", run.job(tmp_path / "out", **settings))
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert "model.layers.0.mlp.gate.weight" in tensors
    assert not any("block_sparse_moe" in name for name in tensors)
    given = load_file(run.directory / "model.safetensors")
    for expert in range(4):
        for name, own in {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}.items():
            stem = f"model.layers.1.mlp.experts.{expert}.{own}"
            codes = unpack(tensors[f"{stem}.qweight"].T.contiguous(), 8)
            zeros = unpack(tensors[f"{stem}.qzeros"], 8).T
            scale, index = tensors[f"{stem}.scales"].float().T, tensors[f"{stem}.g_idx"].long()
            found = (codes - zeros[:, index]) * scale[:, index]
            weight = given[f"model.layers.1.block_sparse_moe.experts.{expert}.{name}.weight"]
            torch.testing.assert_close(found, weight, rtol=0, atol=2e-3)


def test_blocks_of_an_encoder_are_named(tmp_path: Path) -> None:
    """optimum finds the blocks of known decoders alone."""
    run = make_run(tmp_path, QuantConfig(kind="int", group_size=32))
    export_model("gptq", run.job(tmp_path / "out"))
    how = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert "block_name_to_quantize" not in how
    assert _split_at_block("bert.encoder.layer.3.attention.self.query") == (
        "bert.encoder.layer",
        "attention.self.query",
    )
