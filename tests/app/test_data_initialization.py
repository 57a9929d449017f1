"""EVA and LoRA-GA on loaded models: PEFT's EVA, dense gradients, engines, resuming."""

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import transformers as tf
from peft import EvaConfig, PeftModel, get_peft_model, initialize_lora_eva_weights
from peft import LoraConfig as PeftLoraConfig
from torch import Tensor
from torch.nn import functional

from dist_peft.app import python_api
from dist_peft.core.errors import UserError
from dist_peft.core.log import close_log
from dist_peft.core.world import World
from dist_peft.export.verify import Probe, compare_logits
from tests.support.dist import run_ranks
from tests.support.initializations import (
    assert_same_factors,
    compute_paper_factors,
    gather_starts,
    initialize,
    list_lora_layers,
)
from tests.support.story_runs import losses
from tests.support.tiny_runs import tiny_tree, train

EVA: dict[str, Any] = {"init": "eva", "init_samples": 8}
GRADIENT: dict[str, Any] = {"init": "lora_ga", "init_samples": 8}
NF4 = {"kind": "nf4"}


def tree(directory: Path, section: dict[str, Any], **changes: Any) -> dict[str, Any]:
    adapter = {"r": 5, "alpha": 8, **section}
    return tiny_tree(directory, adapter=adapter, train__global_batch=4, **changes)


def read_rows(loaders: Any) -> tuple[Tensor, Tensor]:
    """Tokens and targets of the eight sequences, padded at the right to one length."""
    batches = loaders.train.load_first_sequences(8)
    assert sorted(int(batch.sample_ids[0]) for batch in batches) == list(range(8))
    most = max(batch.input_ids.shape[1] for batch in batches)
    ids = [functional.pad(b.input_ids, (0, most - b.input_ids.shape[1])) for b in batches]
    labels = [functional.pad(b.labels, (0, most - b.labels.shape[1]), value=-100) for b in batches]
    return torch.cat(ids), torch.cat(labels)


def load_plain(directory: Path) -> Any:
    return tf.AutoModelForCausalLM.from_pretrained(directory / "base", dtype=torch.float32)


# -- EVA -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rho", [1.0, 2.0])
def test_eva_equals_peft(rho: float, tmp_path: Path) -> None:
    """PEFT's incremental PCA of one batch, until it has converged."""
    built, loaders = initialize(World(), tree(tmp_path, {**EVA, "init_rho": rho}))
    ids, labels = read_rows(loaders)
    config = PeftLoraConfig(
        r=5,
        lora_alpha=8,
        target_modules=r".*layers\.\d+\..*_proj",
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=rho, tau=0.9999),
    )
    model = get_peft_model(load_plain(tmp_path), config)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    initialize_lora_eva_weights(model, [batch], show_progress_bar=False)
    theirs = {n: m.lora_A["default"].weight for n, m in model.named_modules() if is_adapted(m)}
    layers = list_lora_layers(built)
    assert len(theirs) == len(layers) == 14
    for name, layer in layers.items():
        other = theirs[f"base_model.model.{name}"].double()
        own = layer.lora_A.detach()[layer.lora_A.detach().any(1)].double()
        assert not layer.lora_B.detach().any()
        torch.testing.assert_close(own @ own.T, torch.eye(len(own)).double(), rtol=0, atol=1e-6)
        assert abs(len(own) - len(other)) <= (rho > 1), name  # equal shares of q, k and v
        rank = min(len(own), len(other))
        overlap = (own[:rank] @ other.T).square().sum() / rank
        assert overlap > 0.999, (name, overlap)
    if rho > 1:
        ranks = [int(layer.lora_A.detach().any(1).sum()) for layer in layers.values()]
        assert sum(ranks) == 14 * 5 and len(set(ranks)) > 1 and max(ranks) <= 10


def is_adapted(module: Any) -> bool:
    return hasattr(module, "lora_A") and "default" in module.lora_A


def test_redistributed_ranks_in_peft(tmp_path: Path) -> None:
    """Trained with ranks of 0 to 2r: what is written has them, and is what was trained."""
    section = {**EVA, "r": 1, "alpha": 3, "init_rho": 8.0, "use_rslora": True}
    assert train(tree(tmp_path, section)) == 0
    close_log()
    config = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())
    ranks = config["rank_pattern"].values()
    assert sum(ranks) == 14 and max(ranks) > 1 and len(ranks) < 14
    assert_peft_computes_the_same(tmp_path)


# -- LoRA-GA ---------------------------------------------------------------------------------------


def test_gradient_of_the_dense_weights(tmp_path: Path) -> None:
    built, loaders = initialize(World(), tree(tmp_path, {**GRADIENT, "init_iterations": 30}))
    ids, labels = read_rows(loaders)
    model = load_plain(tmp_path)
    logits = model(input_ids=ids, use_cache=False).logits
    functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    for name, layer in list_lora_layers(built).items():
        expected = compute_paper_factors(model.get_submodule(name).weight.grad.double(), 5, 16.0)
        assert_same_factors(layer.start_A.detach(), layer.start_B.detach(), expected, atol=2e-4)
        assert torch.equal(layer.lora_A, layer.start_A)
        assert torch.equal(layer.lora_B, layer.start_B)
        assert layer.lora_A.data_ptr() != layer.start_A.data_ptr()
    with torch.no_grad():  # training starts at the base, bit for bit
        found = built.model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(found, logits.detach(), rtol=0, atol=2e-6)


# -- both ------------------------------------------------------------------------------------------


@pytest.mark.dist
def test_engines_start_with_the_same_bits(tmp_path: Path) -> None:
    """On three ranks, of which two have fewer micro-batches, as in one process that takes one
    linear at a time."""
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    made = [
        tree(tmp_path, {**section, "init_samples": 7}, base__quant=NF4, base__compute_dtype=dtype)
        for section, dtype in (({**EVA, "init_rho": 2.0}, "bfloat16"), (GRADIENT, "bfloat16"))
    ]
    alone = gather_starts(World(), made, 1)
    engines = [{"kind": "fsdp2"}, {"kind": "zero", "stage": 2}]
    trees = [{**one, "engine": engine} for engine in engines for one in made]
    for rank in run_ranks(gather_starts, 3, trees):
        for expected, found in zip([*alone, *alone], rank, strict=True):
            assert expected.keys() == found.keys()
            assert all(torch.equal(value, expected[name]) for name, value in found.items())
    assert all(alone[1][name].any() for name in alone[1])


def test_resumed_run_does_not_initialize(tmp_path: Path) -> None:
    """And continues with the same numbers; a fresh run has them again."""
    whole = tree(tmp_path, {**GRADIENT, "dropout": 0.2}, base__quant=NF4)
    rest = {**whole, "train": {**whole["train"], "schedule": "constant"}}
    assert train({**rest, "save": {"dir": str(tmp_path / "constant"), "every": 0}}) == 0
    assert train({**rest, "train": {**rest["train"], "steps": 2}}) == 0
    with mock.patch.object(python_api, "initialize_from_data") as initializes:
        assert train(rest) == 0
    close_log()
    assert not initializes.called
    assert losses(tmp_path / "run") == losses(tmp_path / "constant")
    files = [tmp_path / name / "adapter/adapter_model.safetensors" for name in ("run", "constant")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert_peft_computes_the_same(tmp_path, decode=True)


def assert_peft_computes_the_same(directory: Path, decode: bool = False) -> None:
    probe = Probe.load_probe(directory / "run/probe.safetensors")
    model = load_plain(directory)
    if decode:
        built, _ = initialize(World(), {**tree(directory, {}), "base": base_of(directory)})
        for name, layer in list_lora_layers(built).items():
            weight = layer.base.dequantize_weight(torch.float32)
            model.get_submodule(name).weight.data = weight
    adapted = PeftModel.from_pretrained(model, directory / "run/adapter")
    with torch.no_grad():
        found = adapted.eval()(input_ids=probe.input_ids).logits
    difference = compare_logits(found, probe)
    assert difference.relative < 1e-4, difference


def base_of(directory: Path) -> dict[str, Any]:
    return {"path": str(directory / "base"), "compute_dtype": "float32", "quant": NF4}


def test_what_is_refused(tmp_path: Path) -> None:
    def refused(section: dict[str, Any], text: str, **changes: Any) -> None:
        with pytest.raises(UserError, match=text):
            initialize(World(), tree(tmp_path, section, **changes))

    refused({**GRADIENT, "use_dora": True}, "use_dora .* init: lora_ga")
    refused({**EVA, "init_rho": 2.0, "use_dora": True}, "init_rho gives some linears rank 0")
    refused({**GRADIENT, "r": 17}, r"rank of at most 32 in .*, not twice adapter.r, 34")
    refused({**EVA, "init_samples": 1, "r": 8}, "inputs are too few .* raise adapter.init_samples")
    refused({**EVA, "init_rho": 0.5}, "init_rho")
