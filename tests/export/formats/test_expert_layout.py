"""Experts in packed formats: names, refusals, and readers that load them."""

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GraniteMoeConfig

from dist_peft.core.errors import UserError
from dist_peft.export.formats.expert_layout import ExpertLayout
from dist_peft.export.formats.registry import FORMATS, export_model
from dist_peft.export.time_limit import VerificationSkipped
from dist_peft.model.skeleton import build_skeleton
from tests.support.export_runs import FakeRun, fork_consumers, llama, make_run, mixture
from tests.support.packed import unpack


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> FakeRun:
    return make_run(tmp_path_factory.mktemp("mixtral"), None, config=mixture("mixtral"))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> FakeRun:
    return make_run(tmp_path_factory.mktemp("qwen"), None, config=mixture("qwen3_moe"))


def test_limits() -> None:
    """By the model alone; a dense one has none."""
    layout = ExpertLayout(codes_limit="zeros", separate_limit="apart")
    assert layout.find_obstacle(torch.nn.Linear(2, 2), codes=True, separate=True) is None


def test_limits_of_a_mixture(mixtral: FakeRun) -> None:
    model = build_skeleton(mixtral.base, mixtral.directory).model
    layout = ExpertLayout(codes_limit="zeros", separate_limit="apart")
    assert layout.find_obstacle(model) is None
    assert layout.find_obstacle(model, codes=True) == "zeros"
    assert layout.find_obstacle(model, separate=True) == "apart"


def read_tensors(out: Path) -> dict[str, torch.Tensor]:
    if out.is_dir():
        return load_file(out / "model.safetensors")
    return {t.name: torch.from_numpy(t.data.copy()) for t in gguf.GGUFReader(out).tensors}


@pytest.mark.parametrize("name", ["hf-metal", "mlx", "compressed-tensors", "fp8", "gguf"])
def test_stacked_experts_are_written_as_the_published_files_have_them(
    qwen: FakeRun, name: str, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(qwen.directory, base)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.save_pretrained(base, save_original_format=False)
    assert any("gate_up_proj" in key for key in load_file(base / "model.safetensors"))
    run = FakeRun(qwen.base, base, qwen.adapter_dir, qwen.probe, {})
    options: dict[str, Any] = {"merge": True, "lossy": True} if name.startswith("comp") else {}
    found = {}
    for source, out in ((qwen, "apart"), (run, "stacked")):
        file = f"{out}.gguf" if name == "gguf" else out
        export_model(name, source.job(tmp_path / file, group_size=32, **options))
        found[out] = read_tensors(tmp_path / file)
    assert found["apart"].keys() == found["stacked"].keys()
    assert all(torch.equal(found["stacked"][key], value) for key, value in found["apart"].items())


def test_stacks_without_names_of_single_experts_are_packed_by_no_format(tmp_path: Path) -> None:
    """Those that leave experts dense write them as the files have them."""
    config = GraniteMoeConfig(**{**llama().to_dict(), "num_local_experts": 4, "model_type": None})
    run = make_run(tmp_path / "run", None, config=config)
    skeleton = build_skeleton(run.base, run.directory)
    found = ExpertLayout().find_obstacle(skeleton.model)
    assert found is not None and "have the experts stacked" in found
    assert ExpertLayout(packed=False).find_obstacle(skeleton.model) is None
    with pytest.raises(UserError, match="is a mixture of experts: the base's files have"):
        export_model("mlx", run.job(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_experts_are_all_packed_or_none(qwen: FakeRun, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="choose a smaller --group-size"):
        export_model("hf-metal", qwen.job(tmp_path / "out", group_size=64))
    assert not (tmp_path / "out").exists()


READERS: list[Any] = [
    pytest.param("hf-metal", {"bits": 8, "group_size": 32}, 0.05),
    pytest.param("mlx", {"bits": 8, "group_size": 32}, 0.05, marks=pytest.mark.e2e),
    pytest.param("bnb-nf4", {}, 0.9, marks=pytest.mark.e2e),
]


@pytest.mark.parametrize(("name", "settings", "limit"), READERS)
@pytest.mark.parametrize("family", ["mixtral", "qwen"])
def test_reader_computes_with_experts(
    family: str,
    name: str,
    settings: dict[str, Any],
    limit: float,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fork_consumers(monkeypatch)
    run: FakeRun = request.getfixturevalue(family)
    exported = export_model(name, run.job(tmp_path / "out", **settings))
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    dense = FORMATS[name].experts.packed is False  # type: ignore[attr-defined]
    assert exported.written.packed == 2 * (4 if dense else 4 + 3 * 4)
    assert any("switch_mlp" in n for n in names) == (name == "mlx")
    try:
        assert run.verify(name, exported, **settings)[1].relative < limit
    except VerificationSkipped as error:
        pytest.skip(str(error))


def test_mlx_stacks_experts_in_their_order(mixtral: FakeRun, tmp_path: Path) -> None:
    """Codes, scales and biases of an expert are those of its rows, whatever the chunks."""
    settings = {"bits": 8, "group_size": 32}
    export_model("mlx", mixtral.job(tmp_path / "out", **settings, chunk_bytes=4 * 64 * 5))
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    given = load_file(mixtral.directory / "model.safetensors")
    for own, name in {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}.items():
        stem = f"model.layers.1.block_sparse_moe.switch_mlp.{own}"
        for expert in range(4):
            scale, bias = tensors[f"{stem}.scales"][expert], tensors[f"{stem}.biases"][expert]
            codes = unpack(tensors[f"{stem}.weight"][expert], 8).view(*scale.shape, 32)
            found = (codes * scale.unsqueeze(-1) + bias.unsqueeze(-1)).flatten(1)
            weight = given[f"model.layers.1.block_sparse_moe.experts.{expert}.{name}.weight"]
            torch.testing.assert_close(found, weight, rtol=0, atol=2e-3)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_local_experts"] == 4 and config["rope_theta"] == 10000.0
