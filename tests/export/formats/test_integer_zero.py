"""GPTQ and compressed-tensors, decoded by the library or from the description of the format."""

import json
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from safetensors.torch import load_file

from dist_peft.core.config.run import QuantConfig
from dist_peft.core.errors import UserError
from dist_peft.export.formats.registry import export_model
from dist_peft.model.skeleton import parse_torch_dtype
from dist_peft.quant.codec import make_codec
from tests.support.export_runs import FakeRun, make_run
from tests.support.packed import unpack


def base_weights(run: FakeRun) -> dict[str, torch.Tensor]:
    """The base as training saw it: decode(encode(rows))."""
    codec = make_codec(run.base.quant, parse_torch_dtype(run.base.compute_dtype))
    tensors = load_file(run.directory / "model.safetensors")
    return {
        name: codec.dequantize_rows(
            codec.quantize_to_packed(weight), weight.shape[1], torch.float32
        )
        for name, weight in tensors.items()
        if "proj" in name
    }


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_compressed_tensors(bits: int, tmp_path: Path) -> None:
    run = make_run(tmp_path, QuantConfig(kind="int", bits=bits, group_size=32))
    export_model("compressed-tensors", run.job(tmp_path / "out", chunk_bytes=1))
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for name, weight in base_weights(run).items():
        stem = name.removesuffix(".weight")
        shape = torch.Size(tensors[f"{stem}.weight_shape"].tolist())
        scale, packed = tensors[f"{stem}.weight_scale"], tensors[f"{stem}.weight_packed"]
        codes = unpack_from_int32(packed, bits, shape)
        zeros = unpack_from_int32(
            tensors[f"{stem}.weight_zero_point"], bits, scale.shape, packed_dim=0
        )
        codes, zeros = codes.float().view(*scale.shape, 32), zeros.float().unsqueeze(-1)
        assert torch.equal(((codes - zeros) * scale.unsqueeze(-1)).flatten(1), weight)
    how = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert how["config_groups"]["group_0"]["weights"]["num_bits"] == bits
    assert how["ignore"] == ["lm_head"]
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq(bits: int, tmp_path: Path) -> None:
    """``qweight`` and ``qzeros`` transposed are bit streams; zeros are not less one (v2)."""
    run = make_run(tmp_path, QuantConfig(kind="int", bits=bits, group_size=32))
    export_model("gptq", run.job(tmp_path / "out", chunk_bytes=1))
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for name, weight in base_weights(run).items():
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


@pytest.mark.parametrize("name", ["gptq", "compressed-tensors"])
def test_float_zeros_are_refused(name: str, tmp_path: Path) -> None:
    run = make_run(tmp_path, QuantConfig(kind="int", bits=4, group_size=32, solver="hqq"))
    with pytest.raises(UserError, match=r"zeros are fractions \(such as .* hqq .* choose mlx"):
        export_model(name, run.job(tmp_path / "out"))
    assert not list((tmp_path / "out").glob("*.safetensors"))
    export_model(name, run.job(tmp_path / "merged", merge=True, lossy=True))  # quantized anew
