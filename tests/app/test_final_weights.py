"""What a run of full or partial fine-tuning leaves, and what becomes of it."""

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from dist_peft.adapters.full.format import WeightsWriter
from dist_peft.app import cli
from dist_peft.core.config.io import load_config
from dist_peft.core.errors import UserError
from dist_peft.core.log import close_log
from dist_peft.core.world import World
from dist_peft.export.verify import Comparison, Probe, verify_directory
from dist_peft.model.skeleton import parse_torch_dtype
from dist_peft.quant.cpu_products import has_fast_product
from dist_peft.train.step_metrics import read_metrics
from tests.support.dist import run_ranks
from tests.support.story_runs import NF4, losses, train
from tests.support.tiny_models import CONFIGS, save_model
from tests.support.tiny_runs import save_words, tiny_tree

pytestmark = pytest.mark.e2e

PARTIAL: dict[str, Any] = {
    "adapter": {"kind": "partial", "parts": ["norms", "embeddings", "head"], "last_blocks": 1},
    "base__quant": NF4,
    "base__compute_dtype": "bfloat16",
}


def verb(argv: list[str], capsys: pytest.CaptureFixture[str], code: int = 0) -> str:
    """What a verb prints, or its error for another exit code."""
    assert cli.main(argv) == code
    close_log()
    captured = capsys.readouterr()
    return captured.out if code == 0 else captured.err


def merged(
    run: Path, out: Path, capsys: pytest.CaptureFixture[str], base: str = "original"
) -> Comparison:
    argv = ["merge", "--run", str(run), "--out", str(out), "--base", base, "--no-verify"]
    verb(argv, capsys)
    dtype = parse_torch_dtype(load_config(run / "config.yaml").base.compute_dtype)
    return verify_directory(out, Probe.load_probe(run / "probe.safetensors"), dtype)


@pytest.mark.dist
def test_partial_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two ranks, NF4 base in bfloat16: what is merged computes what was trained, bit for bit."""
    made = tiny_tree(tmp_path, train__steps=4, train__lr=3e-3, **PARTIAL)
    assert run_ranks(train, 2, made) == [0, 0]
    run = tmp_path / "run"
    found = losses(run)
    assert min(found) < found[0]
    assert sorted(p.name for p in (run / "adapter").iterdir()) == [
        "README.md",
        "dist_peft.json",
        "model.safetensors",
    ]
    trained = load_file(run / "adapter" / "model.safetensors")
    base = load_file(tmp_path / "base" / "model.safetensors")
    assert all(v.dtype == torch.float32 and v.shape == base[n].shape for n, v in trained.items())
    assert {n for n in trained if "layers.0" in n and "norm" not in n} == set()

    exact = merged(run, tmp_path / "decoded", capsys, "decoded")
    near = merged(run, tmp_path / "original", capsys)
    print(f"loss {found[0]:.4f} -> {found[-1]:.4f}; decoded: {exact}; original: {near}")
    # transformers multiplies natively: the same bits where this processor does so, too
    if has_fast_product(torch.device("cpu"), torch.bfloat16):
        assert exact.max_error == 0
    assert exact.relative < 0.01
    assert 0 < near.relative < 0.1  # the frozen block is not quantized there
    out = load_file(tmp_path / "original" / "model.safetensors")
    assert out.keys() == base.keys()
    for name, value in out.items():
        assert torch.equal(value, trained.get(name, base[name]).to(torch.bfloat16)), name

    printed = verb(["eval", "--config", str(run / "config.yaml"), "--run", str(run)], capsys)
    held_out = json.loads(printed.splitlines()[-1])
    recorded = read_metrics(run / "metrics.jsonl")[-1].eval_loss
    # a rounding to bfloat16 that falls otherwise in another process moves the mean by some 1e-5
    assert held_out == {"eval_loss": pytest.approx(recorded, rel=2e-4), "step": 4}
    assert abs(recorded - found[0]) > 0.01 * found[0]
    for path in (run, run / "adapter"):
        described = verb(["inspect", str(path)], capsys)
        assert "partial fine-tuning" in described and f"in {len(trained)} tensors" in described

    export = ["export", "--run", str(run), "--out", str(tmp_path / "out"), "--format"]
    verb([*export, "mlx", "--no-verify"], capsys)
    assert "no separate adapter for format gptq" in verb([*export, "gptq"], capsys, code=2)
    export[4] = str(tmp_path / "peft")
    assert "PEFT has no format for them" in verb([*export, "peft"], capsys, code=2)


def test_tied_base_whose_files_have_the_head_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One weight learns, and both of its names get it."""
    made = tiny_tree(tmp_path, adapter={"kind": "partial", "parts": ["head", "biases"]})
    save_model(CONFIGS["llama-tied-bias"], tmp_path / "base")
    save_words(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, file, {"format": "pt"})
    assert train(World(), made) == 0
    close_log()
    found = merged(tmp_path / "run", tmp_path / "out", capsys)
    assert found.relative < 0.01
    out = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(out["lm_head.weight"], out["model.embed_tokens.weight"])
    assert not torch.equal(out["lm_head.weight"], tensors["lm_head.weight"].to(torch.bfloat16))


def test_full_run_replaces_an_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the directory of an earlier run; nothing of the old adapter is left to be read."""
    assert train(World(), tiny_tree(tmp_path, train__steps=1)) == 0
    close_log()
    changes: dict[str, Any] = {"adapter": {"kind": "full"}, "resume": "never"}
    assert train(World(), tiny_tree(tmp_path, **changes)) == 0
    close_log()
    run = tmp_path / "run"
    found = merged(run, tmp_path / "out", capsys)
    print(f"full: {found}")
    assert found.relative < 0.01  # the merge is written in bfloat16
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    trained = load_file(run / "adapter" / "model.safetensors")
    for name, value in model.state_dict().items():
        assert torch.equal(value, trained[name].to(torch.bfloat16)), name


def _train_on_a_full_disk(world: World, tree: dict[str, Any]) -> str:
    full = UserError("cannot write model.safetensors: disk is full")
    with (
        mock.patch.object(WeightsWriter, "close", side_effect=full),
        pytest.raises(UserError) as caught,
    ):
        train(world, tree)
    return str(caught.value)


@pytest.mark.dist
def test_full_disk_ends_every_rank(tmp_path: Path) -> None:
    made = tiny_tree(tmp_path, train__steps=1, **PARTIAL)
    assert (
        run_ranks(_train_on_a_full_disk, 2, made)
        == ["cannot write model.safetensors: disk is full"] * 2
    )
