"""``gguf``: name and type of the file; its content is tested in ``test_gguf_file``."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

from dist_peft.core.config.run import BaseConfig, QuantConfig
from dist_peft.core.errors import UserError
from dist_peft.export.formats import gguf_format
from dist_peft.export.formats.gguf_families import FAMILIES
from dist_peft.export.formats.gguf_lora_check import LLAMA_CPP_SERVER
from dist_peft.export.formats.registry import export_model
from dist_peft.export.verify import Probe
from tests.support.export_runs import make_run, mixture
from tests.support.gguf_configs import config_of_family
from tests.support.packed_floats import save_mxfp4


def test_type_follows_the_run(tmp_path: Path) -> None:
    run = make_run(tmp_path, QuantConfig(kind="int", bits=4, group_size=32), group=32)
    kept = export_model("gguf", run.job(tmp_path / "kept", pooled=True))
    assert kept.exact and kept.path == tmp_path / "kept" / "model-q4_1.gguf"
    merged = export_model("gguf", run.job(tmp_path / "merged"))
    assert not merged.exact and merged.how == "merged: Q8_0"
    half = export_model("gguf", run.job(tmp_path / "a.gguf", type="f16", into="decoded"))
    assert half.exact and half.path == tmp_path / "a.gguf"


def test_package_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path, QuantConfig())
    monkeypatch.setattr(gguf_format, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"dist_peft\[export\]"):
        export_model("gguf", run.job(tmp_path / "out"))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_are_one_tensor_in_their_order(family: str, tmp_path: Path) -> None:
    run = make_run(tmp_path, None, config=mixture(family))
    exported = export_model("gguf", run.job(tmp_path / "a.gguf", type="f16", chunk_bytes=4 * 640))
    assert exported.written.packed == 2 * (4 + 3 * 4)
    tensors = {t.name: t for t in gguf.GGUFReader(exported.path).tensors}
    given = load_file(run.directory / "model.safetensors")
    names = {"gate": ("w1", "gate_proj"), "down": ("w2", "down_proj"), "up": ("w3", "up_proj")}
    for own, (mixtral, qwen) in names.items():
        found = torch.from_numpy(np.array(tensors[f"blk.1.ffn_{own}_exps.weight"].data))
        for expert in range(4):
            stem = f"model.layers.1.block_sparse_moe.experts.{expert}.{mixtral}"
            if family != "mixtral":
                stem = f"model.layers.1.mlp.experts.{expert}.{qwen}"
            assert torch.equal(found[expert], given[f"{stem}.weight"].half())
    assert tensors["blk.0.ffn_gate_inp.weight"].tensor_type == gguf.GGMLQuantizationType.F32
    fields = gguf.GGUFReader(exported.path).fields
    name = fields["general.architecture"].contents()
    assert fields[f"{name}.expert_count"].contents() == 4
    assert fields[f"{name}.expert_used_count"].contents() == 2


def test_norms_of_gemma_hold_the_factor(tmp_path: Path) -> None:
    run = make_run(tmp_path, None, config=config_of_family("gemma2"))
    exported = export_model("gguf", run.job(tmp_path / "a.gguf", type="f16"))
    tensors = {t.name: t for t in gguf.GGUFReader(exported.path).tensors}
    given = load_file(run.directory / "model.safetensors")
    for name, own in {
        "blk.1.post_attention_norm": "layers.1.post_attention_layernorm",
        "blk.0.ffn_norm": "layers.0.pre_feedforward_layernorm",
        "output_norm": "norm",
    }.items():
        found = torch.from_numpy(np.array(tensors[f"{name}.weight"].data))
        torch.testing.assert_close(found, given[f"model.{own}.weight"].float() + 1)
    fields = gguf.GGUFReader(exported.path).fields
    assert fields["gemma2.attn_logit_softcapping"].contents() == 50.0


@pytest.mark.e2e
@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_computes_the_trained_logits(family: str, tmp_path: Path) -> None:
    """A wrong order of rows, or a setting that is not read, is an error above 1 %."""
    if LLAMA_CPP_SERVER.find_python() is None:
        pytest.skip("xllamacpp is not installed, here or in DIST_PEFT_XLLAMACPP_PYTHON")
    run = make_run(tmp_path, None, config=config_of_family(family))
    exported = export_model("gguf", run.job(tmp_path / "a.gguf", type="f16"))
    name, found = run.verify("gguf", exported)
    assert "llama.cpp" in name and found.relative < 0.006


@pytest.mark.e2e
def test_llama_cpp_computes_with_the_codes_of_gpt_oss(tmp_path: Path) -> None:
    if LLAMA_CPP_SERVER.find_python() is None:
        pytest.skip("xllamacpp is not installed, here or in DIST_PEFT_XLLAMACPP_PYTHON")
    run = make_run(tmp_path, None, config=config_of_family("gpt_oss"))
    base = save_mxfp4(run.directory, tmp_path / "mxfp4")
    model = tf.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    adapter = load_file(run.adapter_dir / "adapter_model.safetensors")
    with torch.no_grad():
        before = model(input_ids=run.probe.input_ids, use_cache=False).logits
        for name, weight in model.named_parameters():
            owner = f"base_model.model.{name.removesuffix('.weight')}"
            if f"{owner}.lora_A.weight" in adapter:
                A, B = (adapter[f"{owner}.lora_{x}.weight"] for x in "AB")
                weight += 2 * B @ A
        trained = model(input_ids=run.probe.input_ids, use_cache=False).logits
    run.probe = Probe(run.probe.input_ids, trained, before)
    run.base, run.directory = BaseConfig(path=str(base), compute_dtype="float32"), base
    exported = export_model("gguf", run.job(tmp_path / "a.gguf", type="f16"))
    kinds = {
        tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(exported.path).tensors
    }
    assert kinds["blk.0.ffn_gate_exps.weight"] == "MXFP4" and kinds["blk.0.attn_q.weight"] == "F16"
    # llama.cpp rounds the inputs of products with MXFP4 to 8 bits
    assert run.verify("gguf", exported)[1].relative < 0.1


@pytest.mark.e2e
def test_phi3_is_read_by_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(LLAMA_CPP_SERVER), "find_python", lambda consumer: None)
    run = make_run(tmp_path, None, config=config_of_family("phi3"))
    exported = export_model("gguf", run.job(tmp_path / "a.gguf", type="f16"))
    name, found = run.verify("gguf", exported)
    assert "transformers" in name and found.relative < 0.01
