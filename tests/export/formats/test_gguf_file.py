"""A GGUF file, read with the package's own reader and dequantizer."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dist_peft.adapters.directory import write_adapter_directory
from dist_peft.adapters.protocol import PublicAdapter
from dist_peft.core.config.run import BaseConfig, QuantConfig
from dist_peft.core.errors import UserError
from dist_peft.export.formats.export_spec import ExportSpec
from dist_peft.export.formats.registry import export_model
from dist_peft.quant.mxfp4 import Mxfp4Codec
from tests.support.export_runs import FakeRun, make_run, save_tokenizer
from tests.support.gguf_configs import config_of_family
from tests.support.packed_floats import GPT_OSS, save_mxfp4
from tests.support.tiny_models import save_model

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


def test_qalora_that_q4_1_cannot_hold(tmp_path: Path) -> None:
    run = make_run(tmp_path, QuantConfig(kind="int", bits=8, group_size=32), group=32)
    with pytest.raises(UserError, match=r"not 8 bits in groups of 32; use --type q8_0 or f16"):
        export_model("gguf", run.job(tmp_path / "a.gguf", pooled=True, type="q4_1"))
    assert not list(tmp_path.glob("*.gguf")) and not list(tmp_path.glob(".*"))
    exported = export_model("gguf", run.job(tmp_path / "a.gguf", pooled=True))
    assert exported.how == "merged: Q8_0"


def without_adapter(root: Path, base: Path, name: str, **options: str) -> Path:
    """The base in a file: LoRA of zeros on q_proj of layer 0."""
    shapes = {n: t.shape for n, t in load_file(base / "model.safetensors").items()}
    stem = next(n for n in shapes if n.endswith("layers.0.self_attn.q_proj.weight"))
    rows, columns = shapes[stem]
    owner = f"base_model.model.{stem.removesuffix('.weight')}"
    tensors = {
        f"{owner}.lora_A.weight": torch.ones(1, columns),
        f"{owner}.lora_B.weight": torch.zeros(rows, 1),
    }
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q_proj"]}
    write_adapter_directory(root / "adapter", PublicAdapter(config, tensors), {})
    settings = BaseConfig(path=str(base), compute_dtype="float32")
    job = ExportSpec(settings, base, root / "adapter", root / name, options=options)
    return export_model("gguf", job).path


def test_mxfp4_experts_of_gpt_oss_keep_their_codes(tmp_path: Path) -> None:
    """Rows of gate and up, which are in turn in the files, are in tensors of their own."""
    save_model(GPT_OSS, tmp_path / "plain")
    save_tokenizer(tmp_path / "plain")
    base = save_mxfp4(tmp_path / "plain", tmp_path / "base")
    found = read(without_adapter(tmp_path, base, "kept.gguf", type="f16"))
    given = load_file(base / "model.safetensors")
    for own, wanted in (
        ("gate", slice(0, None, 2)),
        ("up", slice(1, None, 2)),
        ("down", slice(None)),
    ):
        name = f"model.layers.1.mlp.experts.{'down' if own == 'down' else 'gate_up'}_proj"
        blocks, scales = given[f"{name}_blocks"], given[f"{name}_scales"]
        rows = torch.cat((blocks.flatten(2), scales), -1).flatten(0, 1)
        rows = torch.nn.functional.pad(rows, (0, -rows.shape[1] % 4))
        values = Mxfp4Codec().dequantize_rows(rows, blocks.shape[2] * 32, torch.float32)
        kind, stored = found[f"blk.1.ffn_{own}_exps.weight"]
        assert kind == "MXFP4"
        assert torch.equal(stored, values.view(3, blocks.shape[1], -1)[:, wanted])
        kind, bias = found[f"blk.1.ffn_{own}_exps.bias"]
        assert kind == "F32" and torch.equal(bias, given[f"{name}_bias"].float()[:, wanted])
    assert found["blk.0.attn_sinks.weight"][0] == "F32"
    assert found["blk.0.attn_q.weight"][0] == "F16"
    assert found["blk.0.ffn_gate_inp.bias"][0] == "F32"
    rounded = read(without_adapter(tmp_path, tmp_path / "plain", "rounded.gguf", type="mxfp4"))
    weight = load_file(tmp_path / "plain" / "model.safetensors")[
        "model.layers.0.mlp.experts.down_proj"
    ]
    codec, rows = Mxfp4Codec(), weight.float().transpose(1, 2).reshape(-1, 96)
    decoded = codec.dequantize_rows(codec.quantize_to_packed(rows), 96, torch.float32)
    assert torch.equal(rounded["blk.0.ffn_down_exps.weight"][1].flatten(0, 1), decoded)
    assert rounded["blk.0.attn_q.weight"][0] == "Q8_0"


STACKED = {
    "granitemoe": ("block_sparse_moe.input_linear.weight", False),
    "llama4_text": ("feed_forward.experts.gate_up_proj", True),
}


@pytest.mark.parametrize("family", STACKED)
def test_halves_of_stacked_experts_are_two_tensors(family: str, tmp_path: Path) -> None:
    save_model(config_of_family(family), tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    found = read(without_adapter(tmp_path, tmp_path / "base", "a.gguf", type="f16"))
    own, transposed = STACKED[family]
    given = load_file(tmp_path / "base" / "model.safetensors")
    stack = next(t for n, t in given.items() if n.endswith(f"layers.1.{own}")).half().float()
    stack = stack.transpose(1, 2) if transposed else stack
    half = stack.shape[1] // 2
    assert torch.equal(found["blk.1.ffn_gate_exps.weight"][1], stack[:, :half])
    assert torch.equal(found["blk.1.ffn_up_exps.weight"][1], stack[:, half:])
