"""A GGUF file, read with the package's own reader and dequantizer."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from dist_peft.core.config.run import QuantConfig
from dist_peft.core.errors import UserError
from dist_peft.export.formats.gguf_file import (
    pack_q4_1_blocks,
    pack_q8_0_blocks,
    pack_symmetric_codes,
)
from dist_peft.export.formats.groups import convert_to_bias_groups, quantize_bias_groups
from dist_peft.export.formats.registry import export_model
from dist_peft.quant.affine import AffineCodec
from tests.support.export_runs import FakeRun, make_run

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OTHERS = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def read(file: Path) -> dict[str, tuple[str, torch.Tensor]]:
    """Name -> (type, float32 values)."""
    found = {}
    for tensor in gguf.GGUFReader(file).tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        found[tensor.name] = (tensor.tensor_type.name, torch.from_numpy(np.array(values)))
    return found


def name_of(name: str) -> str:
    if name in OTHERS:
        return OTHERS[name]
    _, _, layer, own = name.split(".", 3)
    return f"blk.{layer}.{NAMES[own.removesuffix('.weight')]}.weight"


def half_split(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp's row order back to transformers' (neighbouring pairs -> two halves)."""
    size = rows.shape[0] // heads
    out = torch.empty_like(rows)
    for head in range(heads):
        for i in range(size // 2):
            for half in range(2):
                out[head * size + half * size // 2 + i] = rows[head * size + 2 * i + half]
    return out


def compare_all(file: Path, run: FakeRun, kind: str, dense: str, rtol: float, atol: float) -> None:
    found = read(file)
    assert len(found) == len(run.trained)
    for name, wanted in run.trained.items():
        stored, values = found[name_of(name)]
        if wanted.dim() == 1:
            assert stored == "F32"
        else:
            assert stored == (kind if "proj" in name else dense)
        if "q_proj" in name or "k_proj" in name:
            values = half_split(values, 4 if "q_proj" in name else 2)
        torch.testing.assert_close(values, wanted, rtol=rtol, atol=atol)


def test_q4_1_keeps_qalora_up_to_fp16(tmp_path: Path) -> None:
    run = make_run(
        tmp_path, QuantConfig(kind="int", bits=3, group_size=64), group=64, hidden_size=64
    )
    exported = export_model("gguf", run.job(tmp_path / "out", pooled=True, chunk_bytes=4096))
    assert exported.path == tmp_path / "out" / "model-q4_1.gguf"
    found = read(exported.path)
    name = "model.layers.1.self_attn.v_proj.weight"
    kind, values = found[name_of(name)]
    assert kind == "Q4_1"
    torch.testing.assert_close(values, run.trained[name], rtol=1e-3, atol=5e-5)


@pytest.mark.parametrize(
    ("kind", "dtype", "stored", "dense", "rtol", "atol"),
    [
        ("f16", "float32", "F16", "F32", 1e-3, 1e-6),
        ("f16", "bfloat16", "F16", "BF16", 1e-3, 1e-6),
        ("q8_0", "float16", "Q8_0", "F16", 0, 5e-4),
        ("q4_1", "float32", "Q4_1", "F32", 0, 5e-3),
    ],
)
def test_lora_merged(
    kind: str, dtype: str, stored: str, dense: str, rtol: float, atol: float, tmp_path: Path
) -> None:
    run = make_run(tmp_path, QuantConfig(kind="int", bits=4, group_size=32), dtype=dtype)
    job = run.job(tmp_path / "a.gguf", type=kind, into="decoded", chunk_bytes=4096)
    assert export_model("gguf", job).path == tmp_path / "a.gguf"
    compare_all(tmp_path / "a.gguf", run, stored, dense, rtol, atol)
    assert not list(tmp_path.glob(".*"))


def test_blocks_equal_the_packages_own() -> None:
    rows = torch.randn(3, 96, generator=torch.Generator().manual_seed(4))
    found = pack_q8_0_blocks(rows).numpy()
    assert np.array_equal(found, gguf.quantize(rows.numpy(), gguf.GGMLQuantizationType.Q8_0))
    groups = quantize_bias_groups(rows, 4, 32, torch.float16)
    values = gguf.dequantize(pack_q4_1_blocks(groups).numpy(), gguf.GGMLQuantizationType.Q4_1)
    np.testing.assert_allclose(values, groups.dequantize().numpy(), rtol=1e-6, atol=1e-6)
    assert np.array_equal(pack_q8_0_blocks(torch.zeros(1, 32)).numpy(), np.zeros((1, 34), np.uint8))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [32, 64])
def test_blocks_hold_symmetric_codes_without_rounding(bits: int, group: int) -> None:
    """The gguf package's values are the codec's, bit for bit: ``scale * zero`` is exact."""
    codec = AffineCodec(bits, group, "absmax")
    rows = torch.randn(3, 96, generator=torch.Generator().manual_seed(4))
    packed = codec.quantize_to_packed(rows)
    parts = codec.split_packed_rows(packed, 96)
    if bits == 8:
        stored, kind = pack_symmetric_codes(parts, 96), gguf.GGMLQuantizationType.Q8_0
        with pytest.raises(UserError, match="gguf Q8_0 has no zeros"):
            pack_symmetric_codes(parts._replace(zero=parts.zero + 1), 96)
    else:
        groups = convert_to_bias_groups(parts, 96, 32, torch.float16)
        stored, kind = pack_q4_1_blocks(groups), gguf.GGMLQuantizationType.Q4_1
    found = gguf.dequantize(stored.numpy(), kind)
    assert np.array_equal(found, codec.dequantize_rows(packed, 96, torch.float32).numpy())


def test_q8_0_rounds_codes_with_zeros_again() -> None:
    """Codes less their zeros need more than 8 bits; the error is at most 0.57 of a scale."""
    codec = AffineCodec(8, 32)
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(4)) + 1
    packed = codec.quantize_to_packed(weight)
    parts, rows = (
        codec.split_packed_rows(packed, 96),
        codec.dequantize_rows(packed, 96, torch.float),
    )
    signed = parts.codes.unflatten(1, (3, 32)).float() - parts.zero.float().unsqueeze(-1)
    assert float(signed.max()) > 127
    stored = pack_q8_0_blocks(rows)
    found = gguf.dequantize(stored.numpy(), gguf.GGMLQuantizationType.Q8_0)
    scale = stored.view(64, 3, 34)[:, :, :2].contiguous().view(torch.float16).float()
    error = (torch.from_numpy(found) - rows).abs().view(64, 3, 32)
    assert (error <= 0.57 * scale).all() and float((error / scale).max()) > 0.45


def test_qalora_that_q4_1_cannot_hold(tmp_path: Path) -> None:
    run = make_run(tmp_path, QuantConfig(kind="int", bits=8, group_size=32), group=32)
    with pytest.raises(UserError, match=r"not 8 bits in groups of 32; use --type q8_0 or f16"):
        export_model("gguf", run.job(tmp_path / "a.gguf", pooled=True, type="q4_1"))
    assert not list(tmp_path.glob("*.gguf")) and not list(tmp_path.glob(".*"))
    exported = export_model("gguf", run.job(tmp_path / "a.gguf", pooled=True))
    assert exported.how == "merged: Q8_0"
