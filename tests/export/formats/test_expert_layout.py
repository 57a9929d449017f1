"""Experts in packed formats: names, refusals, and readers that load them."""

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    CompressedTensorsConfig,
    FineGrainedFP8Config,
)
from transformers.integrations.finegrained_fp8 import replace_with_fp8_linear

from dist_peft.core.errors import UserError
from dist_peft.export.formats.expert_layout import ExpertLayout
from dist_peft.export.formats.registry import FORMATS, export_model
from dist_peft.export.time_limit import VerificationSkipped
from dist_peft.model.skeleton import build_skeleton
from tests.support.export_runs import (
    FakeRun,
    fork_consumers,
    make_run,
    mixture,
    stacked_mixture,
)
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


@pytest.fixture(scope="module")
def stacks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, FakeRun]:
    root = tmp_path_factory.mktemp("stacks")
    return {
        name: make_run(root / name, None, config=stacked_mixture(name))
        for name in ("granitemoe", "gpt_oss", "llama4_text")
    }


def test_forms_of_stacks_without_names_of_single_experts(stacks: dict[str, FakeRun]) -> None:
    run = stacks["granitemoe"]
    model = build_skeleton(run.base, run.directory).model
    found = ExpertLayout().find_obstacle(model)
    assert found is not None and "have the experts stacked" in found
    assert ExpertLayout(packed=False).choose_form(model) == "dense"
    assert ExpertLayout(dense_stacks=True).choose_form(model) == "dense"
    assert ExpertLayout(stacked=True, dense_stacks=True).choose_form(model) == "stacked"
    assert ExpertLayout(linear_types=frozenset({"granitemoe"})).choose_form(model) == "linears"
    assert ExpertLayout(dense_stacks=True).find_obstacle(model) is None


WHOLE = CompressedTensorsConfig(dequantize=True)
DENSE: dict[str, dict[str, Any]] = {
    "hf-metal": {"bits": 8, "group_size": 32},
    "compressed-tensors": {"merge": True, "lossy": True, "bits": 8, "group_size": 32},
    "fp8": {"group_size": 32},
    "mxfp4": {},
    "nvfp4": {},
}


@pytest.mark.parametrize(
    ("family", "name"), [*(("granitemoe", name) for name in DENSE), ("gpt_oss", "hf-metal")]
)
def test_experts_stay_dense_next_to_packed_linears(
    family: str,
    name: str,
    stacks: dict[str, FakeRun],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """transformers loads both; the log has the bytes of 2 blocks of 4 experts."""
    run = stacks[family]
    exported = export_model(name, run.job(tmp_path / "out", **DENSE[name]))
    assert exported.written.packed == 2 * 4
    limit = 4 if family == "gpt_oss" else {"fp8": 1.2, "mxfp4": 3, "nvfp4": 3}.get(name, 0.3)
    assert run.verify(name, exported)[1].relative < limit  # without the experts: 13.5 and 3.9
    size = 2 * 4 * (3 * 64 * 128) * 4 / 2**20
    assert f"experts stay unquantized, {size:.1f} of " in caplog.text
    given = load_file(run.directory / "model.safetensors")
    written = load_file(tmp_path / "out" / "model.safetensors")
    own = [key for key in given if "experts." in key or "_linear" in key]
    assert own and all(torch.equal(given[key], written[key]) for key in own)
    how = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    left = how.get("ignore") or how["modules_to_not_convert"]
    assert sum(path.endswith(".experts") for path in left) == 2


LINEARS: dict[str, tuple[dict[str, Any], float]] = {
    "compressed-tensors": (DENSE["compressed-tensors"], 0.01),
    "fp8": ({"scales": "row"}, 0.04),
    "mxfp4": ({}, 0.15),
    "bnb-nf4": ({}, 0.12),
    "bnb-int8": ({}, 0.012),
}
"""Format -> options, and the largest error of a matrix relative to its norm."""


@pytest.mark.parametrize("name", LINEARS)
def test_experts_of_llama_4_are_packed_as_linears(
    name: str, stacks: dict[str, FakeRun], tmp_path: Path
) -> None:
    """As llm-compressor publishes them: transformers builds linears for these formats."""
    run, (settings, limit) = stacks["llama4_text"], LINEARS[name]
    exported = export_model(name, run.job(tmp_path / "out", **settings))
    assert exported.written.packed == 2 * (4 + 3 + 3 * 4)
    method = {} if name.startswith("bnb") else {"quantization_config": WHOLE}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map="cpu", **method)
    stem = "model.layers.1.feed_forward.experts"
    given = load_file(run.directory / "model.safetensors")
    gate, up = given[f"{stem}.gate_up_proj"][3].T.chunk(2)
    wanted = {"gate_proj": gate, "up_proj": up, "down_proj": given[f"{stem}.down_proj"][3].T}
    for own, rows in wanted.items():
        linear = loaded.get_submodule(f"{stem}.3.{own}")
        found = linear.weight
        if name == "bnb-nf4":
            assert isinstance(linear, Linear4bit)
            found = dequantize_4bit(found.data, found.quant_state)
        if name == "bnb-int8":
            assert isinstance(linear, Linear8bitLt)
            found = found.data.float() * linear.weight.SCB[:, None] / 127
        assert (found - rows).norm() < limit * rows.norm()
    with torch.no_grad():
        assert loaded.eval()(input_ids=run.probe.input_ids).logits.isfinite().all()


def test_bitsandbytes_packs_no_other_experts(mixtral: FakeRun) -> None:
    """transformers quantizes linears alone, while it loads too."""
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    loaded = AutoModelForCausalLM.from_pretrained(
        mixtral.directory, quantization_config=how, device_map="cpu"
    )
    experts = loaded.model.layers[0].mlp.experts.down_proj
    assert type(experts) is torch.nn.Parameter and experts.is_floating_point()
    assert isinstance(loaded.model.layers[0].self_attn.q_proj, Linear4bit)


@pytest.mark.parametrize("family", ["gpt_oss", "llama4_text"])
def test_gpus_build_the_modules_that_fp8_is_written_for(
    family: str, stacks: dict[str, FakeRun], tmp_path: Path
) -> None:
    """There transformers keeps FP8, and replaces linears and experts that are not excluded."""
    export_model("fp8", stacks[family].job(tmp_path / "out", group_size=32))
    config = AutoConfig.from_pretrained(tmp_path / "out")
    how = FineGrainedFP8Config(**config.quantization_config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    left = how.modules_to_not_convert
    built = replace_with_fp8_linear(model, left, how, pre_quantized=True)
    wanted = {name: tuple(value.shape) for name, value in built.state_dict().items()}
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: tuple(value.shape) for name, value in written.items()} == wanted
    assert any(name.endswith("weight_scale_inv") for name in wanted)


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
