"""pack-quantized, decoded by compressed-tensors."""

import copy
import json
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import load_file

from dist_peft.core.config.run import QuantConfig
from dist_peft.core.errors import UserError
from dist_peft.export.formats.groups import pack_code_words
from dist_peft.export.formats.pack_quantized import quantize_symmetrically
from dist_peft.export.formats.registry import export_model
from tests.support.export_runs import VOCABULARY, decode_base, make_run, mixture
from tests.support.tiny_models import JOINED


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_compressed_tensors(bits: int, tmp_path: Path) -> None:
    run = make_run(tmp_path, QuantConfig(kind="int", bits=bits, group_size=32))
    export_model("compressed-tensors", run.job(tmp_path / "out", chunk_bytes=1))
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for name, weight in decode_base(run).items():
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


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_symmetric_codes_are_decoded_by_the_library(bits: int) -> None:
    rows = torch.randn(6, 64, generator=torch.Generator().manual_seed(bits))
    rows[2, :32] = 0
    codes, scale = quantize_symmetrically(rows, bits, 32, torch.float32)
    args = QuantizationArgs(num_bits=bits, type="int", strategy="group", group_size=32)
    found = BaseCompressor.get_value_from_registry("pack-quantized").decompress(
        {
            "weight_packed": pack_code_words(codes, bits, torch.int32),
            "weight_scale": scale,
            "weight_shape": torch.tensor(rows.shape),
        },
        QuantizationScheme(targets=["Linear"], weights=args),
    )["weight"]
    groups = rows.unflatten(1, (-1, 32))
    step = scale.unsqueeze(-1)
    slow = (groups / step).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * step
    assert torch.equal(found, slow.flatten(1))
    assert not found[2, :32].any()
    assert ((found - rows).abs().unflatten(1, (-1, 32)) <= step / 2 + 1e-6).all()


def test_transformers_loads_experts_of_symmetric_codes(tmp_path: Path) -> None:
    run = make_run(tmp_path, None, config=mixture("qwen3_moe"))
    settings = {"merge": True, "lossy": True, "bits": 8, "group_size": 32}
    exported = export_model("compressed-tensors", run.job(tmp_path / "out", **settings))
    assert exported.written.packed == 2 * (4 + 3 * 4)
    assert run.verify("compressed-tensors", exported, **settings)[1].relative < 0.05


def test_experts_with_zeros_are_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path, QuantConfig(kind="int", group_size=32), config=mixture("mixtral"))
    with pytest.raises(UserError, match="without zero points"):
        export_model("compressed-tensors", run.job(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif("olmo_hybrid" not in JOINED, reason="this transformers has no such type")
@pytest.mark.parametrize("name", ["compressed-tensors", "mxfp4"])
def test_a_convolution_in_three_tensors_is_written_as_one(name: str, tmp_path: Path) -> None:
    """transformers drops the three where it dequantizes packed formats, and loads the one."""
    config = copy.deepcopy(JOINED["olmo_hybrid"])
    config.vocab_size = VOCABULARY
    run = make_run(tmp_path, None, config=config)
    settings = {"merge": True, "lossy": True, "bits": 8, "group_size": 32}
    exported = export_model(name, run.job(tmp_path / "out", **settings))
    assert run.verify(name, exported)[1].relative < (0.1 if "comp" in name else 1)
    given, written = (
        load_file(directory / "model.safetensors")
        for directory in (run.directory, tmp_path / "out")
    )
    stem = "model.layers.0.linear_attn"
    parts = [given[f"{stem}.{own}_conv1d.weight"] for own in "qkv"]
    assert torch.equal(written[f"{stem}.conv1d.weight"], torch.cat(parts))
    assert f"{stem}.q_conv1d.weight" not in written
