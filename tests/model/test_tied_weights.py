"""Tied configurations whose files have both weights, or the head's only."""

import json
import logging
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from dist_peft.adapters.directory import write_adapter_directory
from dist_peft.adapters.protocol import PublicAdapter
from dist_peft.core.config.run import BaseConfig
from dist_peft.export.merge_weights import merge_model
from dist_peft.model.tied_weights import list_tied_names, read_untied_config_keys
from tests.support.loaded_models import IDS, load, logits
from tests.support.tiny_models import CONFIGS, save_model

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def save(directory: Path, family: str, *, head: str, dtype: torch.dtype = torch.float32) -> None:
    """``head``: what the files have: different, equal, alone."""
    save_model(CONFIGS[family], directory, dtype=dtype)
    tensors = load_file(directory / "model.safetensors")
    tensors[HEAD] = tensors[EMBEDDING].clone()
    if head == "different":
        tensors[HEAD] += 0.05 * torch.randn(tensors[HEAD].shape).to(dtype)
    if head == "alone":
        del tensors[EMBEDDING]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
@pytest.mark.parametrize("head", ["different", "equal", "alone"])
def test_as_transformers(
    family: str, head: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, family, head=head)
    original = tf.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with caplog.at_level(logging.WARNING, "dist_peft"):
        skeleton = load(tmp_path)
    torch.testing.assert_close(
        logits(skeleton.model, input_ids=IDS), logits(original, input_ids=IDS), rtol=0, atol=1e-6
    )
    assert skeleton.tied == (head != "different")
    assert ("both with different values" in caplog.text) == (head == "different")


def test_compared_in_the_type_of_the_model(tmp_path: Path) -> None:
    """What differs by less than bfloat16 holds is tied in bfloat16."""
    save(tmp_path, "qwen3", head="equal")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[EMBEDDING] = tensors[EMBEDDING].bfloat16().float()
    tensors[HEAD] = tensors[EMBEDDING] * (1 + 2**-12)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert load(tmp_path, compute_dtype="bfloat16").tied
    assert not load(tmp_path, compute_dtype="float32").tied


@pytest.mark.parametrize("head", ["different", "alone"])
def test_merged(head: str, tmp_path: Path) -> None:
    base, adapter, out = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    save(base, "qwen3", head=head, dtype=torch.bfloat16)
    stem = "base_model.model.model.layers.0.mlp.down_proj"
    tensors = {
        f"{stem}.lora_A.weight": torch.zeros(2, 104),
        f"{stem}.lora_B.weight": torch.zeros(64, 2),
    }
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["down_proj"]}
    write_adapter_directory(adapter, PublicAdapter(config, tensors), {})
    merge_model(BaseConfig(path=str(base), quant=None), base, adapter, out)
    written, stored = (load_file(d / "model.safetensors") for d in (out, base))
    tied = json.loads((out / "config.json").read_text())["tie_word_embeddings"]
    if head == "alone":  # under the name that every runtime looks for
        assert tied and HEAD not in written
        assert torch.equal(written[EMBEDDING], stored[HEAD])
    else:
        assert not tied and torch.equal(written[HEAD], stored[HEAD])
        assert torch.equal(written[EMBEDDING], stored[EMBEDDING])
    models = [tf.AutoModelForCausalLM.from_pretrained(d).eval() for d in (base, out)]
    first, second = (logits(model, input_ids=IDS) for model in models)
    assert torch.equal(first, second)


def test_names_and_settings(tmp_path: Path) -> None:
    first, second = torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 2, bias=False)
    second.weight = first.weight
    assert list_tied_names(torch.nn.ModuleList([first, second])) == {"0.weight": ["1.weight"]}
    config = {"tie_word_embeddings": True, "text_config": {"a": 1, "tie_word_embeddings": True}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_untied_config_keys(tmp_path) == {
        "tie_word_embeddings": False,
        "text_config": {"a": 1, "tie_word_embeddings": False},
    }
