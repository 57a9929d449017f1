"""Merging by streaming against PEFT's own merge, and against the model that was trained."""

import copy
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor

from dist_peft.adapters.directory import write_adapter_directory
from dist_peft.app.model_setup import build_model, load_weights
from dist_peft.app.resolved_config import resolve_config
from dist_peft.core.config.io import parse_config
from dist_peft.core.config.run import BaseConfig, QuantConfig
from dist_peft.core.errors import UserError
from dist_peft.core.world import World
from dist_peft.export.merge_weights import merge_model
from dist_peft.export.model_directory import WriteResult
from dist_peft.model.adapter_module import AdapterModule
from dist_peft.quant.codec import make_codec
from tests.support.tiny_models import CONFIGS, save_model
from tests.support.tiny_runs import save_words

IDS = torch.tensor([[1, 5, 9, 80, 33, 2]])
NF4 = QuantConfig()


def biased_llama(**changes: Any) -> tf.LlamaConfig:
    values = {**CONFIGS["llama"].to_dict(), "attention_bias": True, "tie_word_embeddings": False}
    return tf.LlamaConfig(**{**values, **changes})


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Untied, with biases, in several files, float32."""
    save_model(biased_llama(), tmp_path / "base", max_shard_size="100KB")
    (tmp_path / "base" / "tokenizer.json").write_text('{"kept": true}')
    (tmp_path / "base" / "LICENSE").write_text("licence")
    (tmp_path / "base" / "pytorch_model.bin").write_text("weights of another format")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 2
    return tmp_path / "base"


def make_adapter(base: Path, out: Path, **settings: Any) -> Path:
    """A LoRA that PEFT made and saved, every factor random."""
    model = tf.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(
        r=4, lora_alpha=6, task_type="CAUSAL_LM", target_modules="all-linear", **settings
    )
    adapted = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    adapted.save_pretrained(out)
    return out


def merge(base: Path, adapter: Path, out: Path, **settings: Any) -> dict[str, Tensor]:
    config = BaseConfig(path=str(base), compute_dtype="float32", quant=settings.pop("quant", NF4))
    report = merge_model(config, base, adapter, out, **settings)
    tensors = {
        k: v for file in sorted(out.glob("*.safetensors")) for k, v in load_file(file).items()
    }
    assert report == WriteResult(
        len(tensors), 0, 14, sum(f.stat().st_size for f in out.glob("*.safetensors"))
    )
    return tensors


def stored(directory: Path) -> dict[str, Tensor]:
    return {k: v for file in directory.glob("*.safetensors") for k, v in load_file(file).items()}


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"use_dora": True}], ids=str)
def test_original_base_equals_peft(base: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    adapter = make_adapter(base, tmp_path / "adapter", **settings)
    exact = merge(base, adapter, tmp_path / "fp32", dtype=torch.float32)
    rounded = merge(base, adapter, tmp_path / "bf16")
    model = tf.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    wanted = PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()
    plain = stored(base)
    assert exact.keys() == wanted.keys() == plain.keys()
    changed = 0
    for name, tensor in wanted.items():
        torch.testing.assert_close(exact[name], tensor, rtol=1e-6, atol=1e-6)
        assert torch.equal(rounded[name], exact[name].bfloat16()), name
        if torch.equal(exact[name], plain[name]):
            assert "norm" in name or "embed" in name or "bias" in name or "head" in name
        else:
            changed += 1
    assert changed == 14


@pytest.mark.parametrize("chunk_bytes", [1, 1024, 5000])
def test_chunks_do_not_change_a_byte(base: Path, tmp_path: Path, chunk_bytes: int) -> None:
    adapter = make_adapter(base, tmp_path / "adapter")
    for into in ("original", "decoded"):
        one = merge(base, adapter, tmp_path / f"one-{into}", into=into)
        many = merge(base, adapter, tmp_path / f"many-{into}", into=into, chunk_bytes=chunk_bytes)
        for name, tensor in one.items():
            assert torch.equal(many[name], tensor), name


def test_decoded_base_is_what_training_saw(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path / "adapter")
    merge(base, adapter, tmp_path / "decoded", into="decoded", dtype=torch.float32)
    merge(base, adapter, tmp_path / "original", dtype=torch.float32)
    codec = make_codec(NF4, torch.float32)
    plain = tf.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    seen = copy.deepcopy(plain)
    for name, module in seen.model.named_modules():
        if isinstance(module, torch.nn.Linear) and "layers" in name:
            packed = codec.quantize_to_packed(module.weight.data)
            module.weight.data = codec.dequantize_rows(packed, module.in_features, torch.float32)

    def logits(model: torch.nn.Module) -> Tensor:
        with torch.no_grad():
            return model(input_ids=IDS).logits

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trained = logits(PeftModel.from_pretrained(seen, adapter).eval())
    found = {
        into: logits(tf.AutoModelForCausalLM.from_pretrained(tmp_path / into, dtype=torch.float32))
        for into in ("decoded", "original")
    }
    change = (trained - logits(plain)).abs().max()
    torch.testing.assert_close(found["decoded"], trained, rtol=1e-4, atol=1e-4)
    assert (found["original"] - trained).abs().max() > 0.01 * change  # the quantization error


def test_pissa_into_decoded_base_gives_the_runs_own_logits(base: Path, tmp_path: Path) -> None:
    """Through the model that a run builds: no PEFT, a changed base, trained factors."""
    save_words(base)
    tree = {
        "base": {"path": str(base), "compute_dtype": "float32"},
        "adapter": {"init": "pissa", "r": 4},
        "data": {"train": ["unused.jsonl"]},
    }
    config = parse_config(tree)
    built = load_weights(build_model(resolve_config(config)), World(), torch.device("cpu"))
    generator = torch.Generator().manual_seed(2)
    tensors = {}
    for path, module in built.model.named_modules():
        if isinstance(module, AdapterModule):
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.requires_grad:
                    parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
                tensors[f"{path}.{name}"] = parameter.detach()
    write_adapter_directory(
        tmp_path / "adapter", built.setup.adapter.to_public_adapter(tensors, str(base)), {}
    )
    with torch.no_grad():
        trained = built.model(input_ids=IDS, use_cache=False).logits
    merge(base, tmp_path / "adapter", tmp_path / "out", into="decoded", dtype=torch.float32)
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS).logits, trained, rtol=1e-4, atol=1e-4)


def test_other_files_are_copied(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path / "adapter")
    merge(base, adapter, tmp_path / "out", max_file_bytes=10**5)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == '{"kept": true}'
    assert (tmp_path / "out" / "LICENSE").read_text() == "licence"
    assert not (tmp_path / "out" / "pytorch_model.bin").exists()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and "torch_dtype" not in config
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = {path.name for path in (tmp_path / "out").glob("*.safetensors")}
    assert set(index["weight_map"].values()) == files and len(files) > 1
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.dtype == torch.bfloat16


def test_adapter_of_another_base_is_refused(base: Path, tmp_path: Path) -> None:
    deeper, wider = tmp_path / "deeper", tmp_path / "wider"
    save_model(biased_llama(num_hidden_layers=3), deeper)
    save_model(biased_llama(intermediate_size=120), wider)
    for other in (deeper, wider):
        adapter = make_adapter(other, other / "adapter")
        with pytest.raises(UserError, match="another base"):
            merge(base, adapter, tmp_path / "out")
        assert not list((tmp_path / "out").glob("*.safetensors"))
        assert not (tmp_path / "out" / "config.json").exists()


def test_directory_that_is_not_empty_is_refused(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path / "adapter")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    with pytest.raises(UserError, match="not empty; choose a new directory"):
        merge(base, adapter, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_full_disk_leaves_nothing(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make_adapter(base, tmp_path / "adapter")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UserError, match="1,000 are free"):
        merge(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
