"""``export --format peft-experts``: names of the base's files, PEFT loads it, logits are equal."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from dist_peft.adapters.directory import read_adapter_directory
from dist_peft.app import cli
from dist_peft.core.config.run import BaseConfig
from dist_peft.core.log import close_log
from dist_peft.export.formats.peft_experts import split_experts
from dist_peft.export.verify import Probe
from dist_peft.model.skeleton import build_skeleton
from tests.support.tiny_models import MIXTURES, save_model
from tests.support.tiny_runs import save_words, tiny_tree, train

pytestmark = pytest.mark.e2e

TARGETS = {
    "adapter__target_modules": ["experts", "q_proj"],
    "adapter__rank_pattern": {r"experts\.down_proj": 3},
}
FAMILIES = ("mixtral", "qwen3_moe")


def _train_mixture(family: str, directory: Path, **changes: Any) -> Path:
    tree = tiny_tree(directory, **{**TARGETS, **changes})
    save_model(MIXTURES[family], directory / "base")
    save_words(directory / "base")
    assert train(tree) == 0
    close_log()
    return directory / "run"


@pytest.mark.parametrize("family", FAMILIES)
def test_names_are_those_of_the_base_and_peft_computes_the_trained_logits(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = _train_mixture(family, tmp_path), tmp_path / "out"
    argv = ["export", "--run", str(run), "--format", "peft-experts", "--out", str(out)]
    assert cli.main(argv) == 0
    assert "loaded by peft" in capsys.readouterr().err
    close_log()
    base = set(load_file(tmp_path / "base" / "model.safetensors"))
    written = load_file(out / "adapter_model.safetensors")
    adapted_names = {n for n in base if ".experts." in n or n.endswith("q_proj.weight")}
    assert set(written) == {
        f"base_model.model.{name.removesuffix('.weight')}.lora_{letter}.weight"
        for name in adapted_names
        for letter in "AB"
    }
    assert all(value.dim() == 2 for value in written.values())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapted = PeftModel.from_pretrained(model, str(out)).eval()
    probe = Probe.load_probe(run / "probe.safetensors")
    with torch.no_grad():
        found = adapted(input_ids=probe.input_ids).logits
    assert (probe.trained - probe.before).abs().max() > 1e-2
    torch.testing.assert_close(found, probe.trained, rtol=1e-4, atol=1e-4)


class _ExpertModules(nn.ModuleList):
    """Experts as modules, as models of older versions of transformers had them."""

    def __init__(self, stacked: Any) -> None:
        super().__init__()
        self.functions = [stacked.act_fn]  # in a list, or it would count as an expert
        for gate_up, down in zip(stacked.gate_up_proj, stacked.down_proj, strict=True):
            expert = nn.Module()
            weights = (*gate_up.chunk(2), down)
            for name, weight in zip(("gate_proj", "up_proj", "down_proj"), weights, strict=True):
                linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
                linear.weight = nn.Parameter(weight.detach().clone())
                expert.add_module(name, linear)
            self.append(expert)

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:  # type: ignore[override]
        result = torch.zeros_like(x)
        for token in range(len(x)):
            for number, weight in zip(index[token].tolist(), weights[token], strict=True):
                one: Any = self[number]
                inner = self.functions[0](one.gate_proj(x[token])) * one.up_proj(x[token])
                result[token] += weight * one.down_proj(inner)
        return result


def test_experts_as_modules_with_the_written_factors_compute_the_trained_logits(
    tmp_path: Path,
) -> None:
    """A slow reference: each factor is added to the linear that its name names."""
    run, out = _train_mixture("qwen3_moe", tmp_path), tmp_path / "out"
    argv = ["export", "--run", str(run), "--format", "peft-experts", "--out", str(out)]
    assert cli.main([*argv, "--no-verify"]) == 0
    close_log()
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    for layer in model.model.layers[1:]:  # the first is dense
        layer.mlp.experts = _ExpertModules(layer.mlp.experts)
    config = read_adapter_directory(out).config
    assert not config["rank_pattern"] and not config["alpha_pattern"]
    scaling = config["lora_alpha"] / config["r"]
    written = load_file(out / "adapter_model.safetensors")
    with torch.no_grad():
        for key, A in written.items():
            if key.endswith(".lora_A.weight"):
                path = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                B = written[key.replace("lora_A", "lora_B")]
                model.get_submodule(path).weight += scaling * (B @ A)
        probe = Probe.load_probe(run / "probe.safetensors")
        found = model.eval()(input_ids=probe.input_ids).logits
    torch.testing.assert_close(found, probe.trained, rtol=1e-4, atol=1e-4)


def test_a_projection_without_an_adapter_gets_zeros(tmp_path: Path) -> None:
    targets = ["experts.down_proj"]
    run = _train_mixture("mixtral", tmp_path, adapter__target_modules=targets)
    public = read_adapter_directory(run / "adapter")
    skeleton = build_skeleton(BaseConfig(path=str(tmp_path / "base")), tmp_path / "base")
    tensors = split_experts(public, skeleton).tensors
    assert len(tensors) == 2 * 2 * 4 * 3  # layers, A and B, experts, projections
    for key, value in tensors.items():
        assert bool(value.any()) == (".w2." in key)


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(tiny_tree(tmp_path)) == 0
    close_log()
    argv = ["export", "--run", str(tmp_path / "run"), "--out", str(tmp_path / "out")]
    assert cli.main([*argv, "--format", "peft-experts"]) == 2
    assert "the base has no experts; --format peft is the same" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    close_log()
