"""QA-LoRA on real weights: every engine and width, the exact merge, stopping and resuming."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from dist_peft.adapters.directory import open_adapter_merger
from dist_peft.adapters.low_rank.zero_points import measure_lost_share
from dist_peft.app import cli
from dist_peft.core.config.io import load_config
from dist_peft.core.log import close_log
from dist_peft.core.span import Span
from dist_peft.core.world import World
from dist_peft.export.merge_weights import merge_model
from dist_peft.export.verify import Probe, compare_logits
from dist_peft.quant.affine import AffineCodec, AffineParts
from tests.support.dist import run_ranks
from tests.support.equality import Outcome, assert_same, losses_and_gradients
from tests.support.story_runs import losses, run_config, train

pytestmark = [pytest.mark.dist, pytest.mark.data]

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"]
"""All of stories260K's linears but down_proj, whose 172 inputs no group divides."""

ADAPTER = {"kind": "qalora", "r": 4, "alpha": 8, "target_modules": TARGETS}
SHORT = {"train__steps": 4}
"""Of the comparisons of engines; see ``test_equality``."""


def integer(bits: int) -> dict[str, Any]:
    return {"kind": "int", "bits": bits, "group_size": 32}


CASES: dict[str, dict[str, Any]] = {
    "int4": {"base__quant": integer(4), "adapter__dropout": 0.1, **SHORT},
    "int3": {"base__quant": integer(3), **SHORT},
    "int2": {"base__quant": integer(2), **SHORT},
    "int4, groups of 16 pooled by 32": {
        "base__quant": {**integer(4), "group_size": 16},
        "adapter__pool_size": 32,
        **SHORT,
    },
}
ENGINES: dict[str, dict[str, Any]] = {
    "fsdp2": {"kind": "fsdp2"},
    "zero 1": {"kind": "zero", "stage": 1},
    "zero 2": {"kind": "zero", "stage": 2},
    "zero 3": {"kind": "zero", "stage": 3},  # last: it replaces functional.linear for good
}


def tree(shared_data: Path, directory: Path, case: str, **changes: Any) -> dict[str, Any]:
    return run_config(shared_data, directory, **{"adapter": ADAPTER, **CASES[case], **changes})


def all_outcomes(world: World, trees: dict[Any, dict[str, Any]]) -> dict[Any, Outcome]:
    """One set of processes for everything: starting them takes longer than most cases."""
    return {key: losses_and_gradients(world, tree) for key, tree in trees.items()}


RUNS = [
    *((2, "fsdp2", case) for case in CASES),
    (2, "zero 1", "int4"),
    (2, "zero 3", "int3"),
    (3, "fsdp2", "int4"),
    (3, "zero 2", "int4, groups of 16 pooled by 32"),
]
"""Ranks, engine, case: each width and engine at 2 or at 3 ranks, not their whole product."""


@pytest.fixture(scope="module")
def outcomes(
    shared_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, list[dict[Any, Outcome]]]:
    """Number of ranks -> what each rank got for each engine and case."""
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    directory = tmp_path_factory.mktemp("qalora")
    single = [(1, "single", case) for case in CASES]
    result = {}
    for ranks in (1, 2, 3):
        trees = {
            (name, case): tree(
                shared_data, directory, case, engine=ENGINES.get(name, {"kind": "single"})
            )
            for size, name, case in [*single, *RUNS]
            if size == ranks
        }
        result[ranks] = run_ranks(all_outcomes, ranks, trees, timeout=400)
    return result


@pytest.mark.parametrize(("ranks", "engine", "case"), RUNS)
def test_equals_single(
    outcomes: dict[int, list[dict[Any, Outcome]]], ranks: int, engine: str, case: str
) -> None:
    """fp32 losses within 1e-6 of one process's, gradients after them likewise; losses fall."""
    expected = outcomes[1][0]["single", case]
    for outcome in outcomes[ranks]:
        assert_same(outcome[engine, case], expected)
    print(f"{case}, {engine}: loss {expected[0][0]:.4f} -> {expected[0][-1]:.4f}")


# -- the finished run ------------------------------------------------------------------------------


@pytest.fixture(
    scope="module", params=[pytest.param(n, marks=pytest.mark.turn(n % 3, 3)) for n in (4, 3, 2)]
)
def run(
    request: pytest.FixtureRequest,
    shared_data: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[int, Path, Path]:
    """(bits, base, run directory) after 20 steps on held-out and training stories.

    Widths take turns: ``test_equals_single`` trains each of them in every turn."""
    directory = tmp_path_factory.mktemp(f"int{request.param}")
    bits = request.param
    whole = run_config(
        shared_data, directory, adapter=ADAPTER, base__quant=integer(bits), train__lr=2e-3
    )
    source = whole["data"]["train"][0]
    whole["data"]["eval"] = [{**source, "path": source["path"], "limit": 8}]
    assert train(World(), whole) == 0
    close_log()
    found = losses(directory / "run")
    assert found[-1] < found[0]
    print(f"int{bits}: loss {found[0]:.4f} -> {found[-1]:.4f}")
    return bits, Path(whole["base"]["path"]), directory / "run"


class Exact:
    """Codes, scales and zeros of every linear of the blocks: as trained, and merged."""

    def __init__(self, bits: int, base: Path, run: Path) -> None:
        self.codec = AffineCodec(bits, 32)
        self.model = tf.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        self.merger = open_adapter_merger(run / "adapter")
        self.original: dict[str, AffineParts] = {}
        self.merged: dict[str, AffineParts] = {}
        self.changes: dict[str, Tensor] = {}
        for name, weight in self.model.state_dict().items():
            if ".layers." not in name or not name.endswith("proj.weight"):
                continue
            span = Span(0, weight.shape[0])
            parts = self.codec.split_packed_rows(
                self.codec.quantize_to_packed(weight), weight.shape[1]
            )
            self.original[name] = self.merged[name] = parts
            if self.merger.changes_weight(name):
                self.merged[name] = self.merger.merge_affine_parts(name, parts, span)
                self.changes[name] = self.merger.compute_group_change(name, parts, span)

    @torch.no_grad()
    def logits(self, parts: dict[str, AffineParts], ids: Tensor) -> Tensor:
        """Of plain transformers in float32."""
        for name, (codes, scale, zero) in parts.items():
            weight = self.model.get_parameter(name)
            numbers = codes.float().unflatten(1, (scale.shape[1], -1))
            rows = ((numbers - zero.float()[..., None]) * scale.float()[..., None]).flatten(1)
            weight.copy_(rows[:, : weight.shape[1]])
        return self.model(input_ids=ids, use_cache=False).logits


def test_merge_into_zeros_is_exact(run: tuple[int, Path, Path]) -> None:
    """Merged codes, computed by plain transformers, against base + adapter as trained."""
    exact = Exact(*run)
    probe = Probe.load_probe(run[2] / "probe.safetensors")
    before = compare_logits(exact.logits(exact.original, probe.input_ids), probe)
    assert before.relative == pytest.approx(1.0, rel=1e-3)  # the bare base, as it was
    found = compare_logits(exact.logits(exact.merged, probe.input_ids), probe)
    print(f"int{run[0]}: {found.relative:.1e} of what training changed; {found}")
    assert found.relative < 2e-4 and found.max_error < 1e-4
    for name, merged in exact.merged.items():
        assert torch.equal(merged.codes, exact.original[name].codes)
        assert torch.equal(merged.scale, exact.original[name].scale)
    assert exact.merger.list_unused_tensors() == []


def test_unmerge_gives_the_base_back(run: tuple[int, Path, Path]) -> None:
    exact = Exact(*run)
    for name in exact.changes:
        rows = exact.merged[name].codes.shape[0]
        back = exact.merger.unmerge_affine_parts(name, exact.merged[name], Span(0, rows))
        assert not torch.equal(exact.merged[name].zero, exact.original[name].zero)
        for got, want in zip(back, exact.original[name], strict=True):
            assert got.dtype == want.dtype and torch.equal(got, want)


def test_the_documented_snippet_runs(
    run: tuple[int, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (Path(__file__).parents[2] / "docs" / "adapters" / "qalora.md").read_text()
    (snippet,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "base").symlink_to(run[1])
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "NAME").symlink_to(run[2])
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(snippet.replace("bits=4", f"bits={run[0]}"), names)
    assert not torch.equal(names["merged"].zero, names["parts"].zero)


@pytest.mark.parametrize("convention", ["peft", "mean"])
def test_adapter_of_another_program_is_exported_as_a_run(
    run: tuple[int, Path, Path], tmp_path: Path, convention: str
) -> None:
    """The same factors as the other program would hold them give the same merged model."""
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    shutil.copy(run[2] / "config.yaml", foreign)
    config = json.loads((run[2] / "adapter" / "adapter_config.json").read_text())
    tensors = load_file(run[2] / "adapter" / "adapter_model.safetensors")
    config |= {"peft_type": "LORA", "use_qalora": True}
    del config["qalora_pool"]
    if convention == "mean":
        config["qalora_pool"] = "mean"
    for name in (n for n in tensors if "lora_B" in n):
        groups = tensors[name.replace("lora_B", "lora_A")].shape[1]
        tensors[name] *= 32 if convention == "mean" else 32 / groups
    (foreign / "adapter").mkdir()
    (foreign / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, foreign / "adapter" / "adapter_model.safetensors")
    for directory in (foreign, run[2]):
        argv = ["export", "--format", "mlx", "--no-verify", "--run", str(directory)]
        assert cli.main([*argv, "--out", str(tmp_path / f"{directory.name} out")]) == 0
    close_log()
    found, wanted = (
        load_file(tmp_path / f"{directory.name} out" / "model.safetensors")
        for directory in (foreign, run[2])
    )
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_integer_zeros_would_lose_it(run: tuple[int, Path, Path]) -> None:
    exact = Exact(*run)
    pieces = [(exact.original[name], change) for name, change in exact.changes.items()]
    share = measure_lost_share(pieces, run[0])
    print(f"int{run[0]}: {share:.1%} of the adapter would be lost")
    assert share > 0.5


def test_merge_into_the_decoded_rows(run: tuple[int, Path, Path], tmp_path: Path) -> None:
    """``dist-peft merge --base decoded``, in float32 to tell the merge from rounding to bf16."""
    config = load_config(run[2] / "config.yaml")
    out = tmp_path / "out"
    merge_model(config.base, run[1], run[2] / "adapter", out, into="decoded", dtype=torch.float32)
    probe = Probe.load_probe(run[2] / "probe.safetensors")
    model = tf.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    with torch.no_grad():
        found = compare_logits(model(input_ids=probe.input_ids, use_cache=False).logits, probe)
    assert found.relative < 2e-4


@pytest.mark.parametrize("name", ["peft-expanded", "peft"])
def test_adapter_formats(run: tuple[int, Path, Path], tmp_path: Path, name: str) -> None:
    """``export`` of the adapter; the expanded one is computed by PEFT on the base as trained."""
    bits, base, directory = run
    argv = ["export", "--format", name, "--run", str(directory), "--out", str(tmp_path / "out")]
    assert cli.main(argv) == 0
    close_log()
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config.get("use_qalora", False) == (name == "peft")
    exact = Exact(bits, base, directory)
    probe = Probe.load_probe(directory / "probe.safetensors")
    if name == "peft":  # needs gptqmodel's linears: tests/adapters/qalora/test_format.py
        with pytest.raises(RuntimeError, match="size mismatch"):
            PeftModel.from_pretrained(exact.model, tmp_path / "out")
        return
    exact.logits(exact.original, probe.input_ids)  # puts the base as trained into the model
    adapted = PeftModel.from_pretrained(exact.model, tmp_path / "out").eval()
    with torch.no_grad():
        found = compare_logits(adapted(input_ids=probe.input_ids, use_cache=False).logits, probe)
    print(f"int{bits}, PEFT: {found.relative:.1e} of what training changed")
    assert found.relative < 2e-4


def test_integer_zero_format_is_refused_with_the_share(
    run: tuple[int, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["export", "--format", "gptq", "--merge", "--run", str(run[2])]
    assert cli.main([*argv, "--out", str(tmp_path / "out")]) == 2
    close_log()
    message = capsys.readouterr().err
    print(message)
    assert re.search(r"loses \d+\.\d% of this run's adapter \(measured\)", message)
