"""MXFP4 decoded from its description, and loaded by transformers and compressed-tensors."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dist_peft.adapters.directory import write_adapter_directory
from dist_peft.adapters.protocol import PublicAdapter
from dist_peft.core.config.run import BaseConfig, QuantConfig
from dist_peft.core.errors import UserError
from dist_peft.export.formats.registry import export_model
from dist_peft.export.verify import Probe
from tests.support.export_runs import FakeRun, make_run, mark_as_trained_through, mixture
from tests.support.packed_floats import GPT_OSS, save_mxfp4, save_tokenized, to_mxfp4

EXPERTS = "model.layers.1.mlp.experts"


def gpt_oss_run(directory: Path, base: Path) -> FakeRun:
    """LoRA on ``q_proj``; the probe's logits are those of ``transformers``."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    ids = torch.arange(3, 23).unsqueeze(0)
    tensors = {}
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        before = model(input_ids=ids, use_cache=False).logits
        for name, weight in model.named_parameters():
            if name.endswith("q_proj.weight"):
                A = torch.randn(2, weight.shape[1], generator=generator) * 0.3
                B = torch.randn(weight.shape[0], 2, generator=generator)
                stem = f"base_model.model.{name.removesuffix('.weight')}"
                tensors |= {f"{stem}.lora_A.weight": A, f"{stem}.lora_B.weight": B}
                weight += B @ A
        trained = model(input_ids=ids, use_cache=False).logits
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    write_adapter_directory(directory / "adapter", PublicAdapter(config, tensors), {})
    settings = BaseConfig(path=str(base), compute_dtype="float32")
    return FakeRun(settings, base, directory / "adapter", Probe(ids, trained, before), {})


def test_a_merge_of_gpt_oss_is_written_as_it_is_published(tmp_path: Path) -> None:
    """Experts without an adapter keep their bytes; transformers computes the trained logits."""
    plain = save_tokenized(GPT_OSS, tmp_path / "plain")
    base = save_mxfp4(plain, tmp_path / "mxfp4")
    run = gpt_oss_run(tmp_path, base)
    exported = export_model("mxfp4", run.job(tmp_path / "out"))
    assert exported.written.packed == 4
    before, after = (load_file(d / "model.safetensors") for d in (base, tmp_path / "out"))
    assert before.keys() == after.keys()
    for name in (f"{EXPERTS}.{own}" for own in ("gate_up_proj", "down_proj")):
        assert torch.equal(before[f"{name}_blocks"], after[f"{name}_blocks"])
        assert torch.equal(before[f"{name}_scales"], after[f"{name}_scales"])
    assert run.verify("mxfp4", exported)[1].relative < 1e-5


def test_experts_of_mxfp4_are_written_dense_where_no_reader_has_packed_ones(
    tmp_path: Path,
) -> None:
    base = save_mxfp4(save_tokenized(GPT_OSS, tmp_path / "plain"), tmp_path / "mxfp4")
    run = gpt_oss_run(tmp_path, base)
    exported = export_model("hf-metal", run.job(tmp_path / "out", bits=8, group_size=32))
    assert exported.written.packed == 2 * 4
    assert run.verify("hf-metal", exported)[1].relative < 0.05


def test_experts_in_bfloat16_are_rounded(tmp_path: Path) -> None:
    plain = save_tokenized(GPT_OSS, tmp_path / "plain")
    run = gpt_oss_run(tmp_path, plain)
    exported = export_model("mxfp4", run.job(tmp_path / "out"))
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    weight = load_file(plain / "model.safetensors")[f"{EXPERTS}.down_proj"]
    blocks, scales = to_mxfp4(weight.transpose(1, 2))
    assert torch.equal(tensors[f"{EXPERTS}.down_proj_scales"], scales)
    ties = (tensors[f"{EXPERTS}.down_proj_blocks"] != blocks).float().mean()
    assert ties < 0.01 and tensors[f"{EXPERTS}.down_proj_blocks"].shape == blocks.shape
    assert run.verify("mxfp4", exported)[1].relative < 0.9


@pytest.mark.parametrize("experts", [False, True], ids=["dense", "mixture"])
def test_other_models_are_loaded_by_compressed_tensors(experts: bool, tmp_path: Path) -> None:
    run = make_run(tmp_path, None, config=mixture("qwen3_moe") if experts else None)
    exported = export_model("mxfp4", run.job(tmp_path / "out"))
    assert exported.written.packed == (2 * (4 + 3 * 4) if experts else 14)
    assert run.verify("mxfp4", exported)[1].relative < 1
    how = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert how["format"] == "mxfp4-pack-quantized"


def test_trained_codes(tmp_path: Path) -> None:
    run = make_run(tmp_path, QuantConfig(kind="mxfp4"))
    mark_as_trained_through(run)
    assert export_model("mxfp4", run.job(tmp_path / "out", trained_codes=True)).exact
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    stem = "model.layers.0.mlp.up_proj"
    base = load_file(run.directory / "model.safetensors")[f"{stem}.weight"].float()
    adapter = load_file(run.adapter_dir / "adapter_model.safetensors")
    A, B = (adapter[f"base_model.model.{stem}.lora_{x}.weight"] for x in "AB")
    blocks, scales = to_mxfp4(base + 2 * B @ A)
    assert torch.equal(tensors[f"{stem}.weight_scale"], scales)
    differ = tensors[f"{stem}.weight_packed"] != blocks.flatten(1)
    assert differ.float().mean() < 0.01
    run.base = run.base.model_copy(update={"quant": QuantConfig()})
    with pytest.raises(UserError, match=r"keeps codes of base\.quant\.kind mxfp4"):
        export_model("mxfp4", run.job(tmp_path / "nf4", trained_codes=True))
