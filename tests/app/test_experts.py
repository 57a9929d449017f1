"""Mixtures of experts on every engine: losses, resuming, merges, and PEFT's library."""

import warnings
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import peft
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from torch import nn

from dist_peft.adapters.directory import read_adapter_directory, write_adapter_directory
from dist_peft.app import cli
from dist_peft.app.verified_export import merge_finished_run
from dist_peft.core.log import close_log
from dist_peft.core.world import World
from dist_peft.engine import Engine
from dist_peft.export.verify import Probe, compare_logits
from dist_peft.quant.nf4 import Nf4Codec
from dist_peft.train.step_metrics import read_metrics
from tests.support import equality
from tests.support.dist import run_ranks
from tests.support.engines import (
    Outcomes,
    Runs,
    check_equals_single,
    check_resumes,
    outcomes_of,
    pairs,
)
from tests.support.equality import Outcome, all_cases, assert_same, build
from tests.support.story_runs import NF4, train
from tests.support.tiny_models import MIXTURES, save_model
from tests.support.tiny_runs import save_config, save_records, tiny_tree

pytestmark = pytest.mark.dist

INT4 = {"kind": "int", "bits": 4, "group_size": 32}
CASES: dict[str, dict[str, Any]] = {
    "mixtral": {
        "base__quant": NF4,
        "adapter__train_router": True,
        "adapter__router_aux_loss": 0.3,
    },
    "qwen2_moe": {"base__quant": INT4, "data__packing": False},
    "qwen3_moe": {
        "base__quant": {**INT4, "solver": "hqq"},
        "adapter__target_modules": ["experts", "q_proj"],
        "adapter__rank_pattern": {r"experts\.down_proj": 3},
        "adapter__dropout": 0.1,
        "adapter__use_rslora": True,
        "engine__activation_checkpointing": False,
    },
}
RUNS: Runs = {
    "fsdp2 2": (2, {"kind": "fsdp2"}, tuple(CASES)),
    "fsdp2 3": (3, {"kind": "fsdp2"}, ("mixtral",)),
    "fsdp2 3, tokens": (3, {"kind": "fsdp2", "gather_experts": "tokens"}, tuple(CASES)),
    "zero 2": (2, {"kind": "zero", "stage": 2}, ("qwen2_moe",)),
    "zero 2, tokens": (2, {"kind": "zero", "stage": 2, "gather_experts": "tokens"}, tuple(CASES)),
    "zero 3, tokens": (2, {"kind": "zero", "stage": 3, "gather_experts": "tokens"}, tuple(CASES)),
    "zero 3": (2, {"kind": "zero", "stage": 3}, ("mixtral", "qwen3_moe")),
}
"""Ranks, engine, families: rows of experts lie across ranks in all of them."""


def tree(directory: Path, family: str, **changes: Any) -> dict[str, Any]:
    """Four rows a step, of three short documents each where packed."""
    short = {
        "train__steps": 3,
        "train__global_batch": 4,
        "data__train": [str(save_records(directory / "twelve.jsonl", 12))],
        "data__packing": True,
        "data__seq_len": 32,
        "engine": {},
    }
    whole = tiny_tree(directory, **{**short, **CASES[family], **changes})
    base = directory / family
    if not base.is_dir():
        (directory / "base").rename(base)
        (base / "model.safetensors").unlink()
        save_model(MIXTURES[family], base)
    whole["base"]["path"] = str(base)
    return whole


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    directory = tmp_path_factory.mktemp("experts")
    singles = {family: tree(directory, family) for family in CASES}
    return outcomes_of(singles, RUNS)


@pytest.mark.parametrize(("run", "family"), pairs(RUNS))
def test_equals_single(outcomes: Outcomes, run: str, family: str) -> None:
    gradients = outcomes["single"][0][family][1]
    assert any("experts.down_proj.lora_B" in name for name in gradients)
    check_equals_single(outcomes, run, family)


def test_resumed_at_other_ranks(tmp_path: Path) -> None:
    """What travels is counted: the packed rows of each block, whichever experts were chosen."""
    check_resumes(tmp_path, partial(tree, tmp_path, "qwen2_moe"), 3)
    first, second, *alone = read_metrics(tmp_path / "cut" / "metrics.jsonl")
    assert [record.bytes_gathered for record in alone] == [0, 0]
    # two micro-batches, forward and backward: four times everything, were it in float32
    most = 4 * (tmp_path / "qwen2_moe" / "model.safetensors").stat().st_size
    assert 0 < second.bytes_gathered < most / 2
    assert first.bytes_gathered == pytest.approx(second.bytes_gathered, rel=1e-2)  # other tokens


def test_resumed_without_travelling_tokens(tmp_path: Path) -> None:
    """A checkpoint names neither ranks nor the way of the experts."""
    make = partial(tree, tmp_path, "qwen2_moe")
    check_resumes(tmp_path, make, 3, gather_experts="tokens")


# -- choices ---------------------------------------------------------------------------------------


BYTES_OF_AN_EXPERT = sum(
    rows * Nf4Codec().num_row_bytes(columns) for rows, columns in ((2 * 104, 64), (64, 104))
)


def routed(world: World, whole: dict[str, Any]) -> tuple[Outcome, int]:
    """Rows of even number choose experts 0 and 1, the others expert 2 twice; 3 is never chosen.
    With the bytes that were gathered."""
    engines: list[Engine] = []

    def hooked(*args: Any) -> Any:
        config, built, loaders, call = build(*args)
        adapter: Any = built.setup.adapter
        position = adapter.trunk.position  # inside of that of the routers

        def route(module: nn.Module, inputs: Any, output: Any) -> Any:
            logits, scores, index = output
            even = position.sample_ids[0] % 2 == 0
            return logits, scores, torch.tensor([0, 1] if even else [2, 2]).expand_as(index)

        for module in built.model.modules():
            if type(module).__name__ == "MixtralTopKRouter":
                module.register_forward_hook(route)
        engines.append(built.engine)
        return config, built, loaders, call

    with mock.patch.object(equality, "build", hooked):
        return equality.losses_and_gradients(world, whole), engines[0].bytes_gathered


def routed_both_ways(
    world: World, whole: dict[str, Any], engine: dict[str, Any]
) -> list[tuple[Outcome, int]]:
    """The same with all experts gathered, with those that tokens are routed to, and with none."""
    choices = ("all", "routed", "tokens")
    return [routed(world, {**whole, "engine": {**engine, "gather_experts": c}}) for c in choices]


@pytest.mark.parametrize(
    ("ranks", "engine"),
    [
        (3, {"kind": "fsdp2"}),
        (2, {"kind": "fsdp2", "activation_checkpointing": False}),
        (2, {"kind": "zero", "stage": 2}),
    ],
    ids=["fsdp2 3", "fsdp2 2", "zero 2"],
)
def test_experts_that_nobody_chooses(ranks: int, engine: dict[str, Any], tmp_path: Path) -> None:
    """Ranks whose tokens share no expert call the same collectives; an expert that no token chose
    has a gradient of zero, and with ``gather_experts: routed`` is not gathered: the same bits.
    With ``tokens`` ranks get no row in some micro-batches: the same to rounding."""
    whole = tree(tmp_path, "mixtral", train__global_batch=6)
    expected, _ = routed(World(), whole)
    for (outcome, all_bytes), (other, bytes_gathered), (travelled, _) in run_ranks(
        routed_both_ways, ranks, whole, engine
    ):
        assert_same(outcome, expected)
        assert_same(travelled, expected)
        assert other[0] == outcome[0]
        assert all(torch.equal(other[1][name], value) for name, value in outcome[1].items())
        # forward and backward of two layers, in three steps and one more: at least expert 3
        micro_batches = 4 * 6 // ranks
        assert all_bytes - bytes_gathered >= 2 * 2 * micro_batches * BYTES_OF_AN_EXPERT
    found = {n: g for n, g in expected[1].items() if n.endswith("experts.gate_up_proj.lora_B")}
    for gradient in found.values():
        by_expert = gradient.unflatten(1, (-1, 4)).abs().sum((0, 1))
        assert (by_expert[:3] > 0).all() and by_expert[3] == 0
    assert len(found) == 2


# -- finished runs ---------------------------------------------------------------------------------


def load(directory: Path) -> tf.PreTrainedModel:
    return tf.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


@pytest.mark.parametrize("family", MIXTURES)
def test_peft_and_transformers_compute_the_same(family: str, tmp_path: Path) -> None:
    """PEFT loads the adapter, ``transformers`` the merged model; both give the trained logits.
    PEFT's own save of it is read back."""
    targets = {"adapter__target_modules": "all-linear"}
    settings = {
        **targets,
        "base__quant": None,
        "adapter__rank_pattern": {"down_proj": 3},
        "train__lr": 0.1,
    }
    whole = tree(tmp_path, family, train__steps=6, save__every=0, **settings)
    assert train(World(), whole) == 0
    close_log()
    run, base = tmp_path / "run", Path(whole["base"]["path"])
    probe = Probe.load_probe(run / "probe.safetensors")
    assert (probe.trained - probe.before).abs().max() > 0.1

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        model = peft.PeftModel.from_pretrained(load(base), run / "adapter").eval()
    found = compare_logits(model(input_ids=probe.input_ids).logits, probe)
    print(f"{family}: PEFT {found.relative:.1e} of what training changed")
    assert found.relative < 1e-5

    model.save_pretrained(tmp_path / "theirs")
    ours, theirs = (
        read_adapter_directory(run / "adapter"),
        read_adapter_directory(tmp_path / "theirs"),
    )
    assert ours.tensors.keys() == theirs.tensors.keys()
    write_adapter_directory(run / "adapter", theirs, {})
    into = "decoded" if family == "mixtral" else "original"
    merge_finished_run(run, tmp_path / "merged", into=into, verify=None)
    merged = compare_logits(load(tmp_path / "merged")(input_ids=probe.input_ids).logits, probe)
    print(f"{family}: merged to bf16 {merged.relative:.1e}")
    assert merged.relative < 0.05


def test_finished_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On NF4, from files that have the experts stacked: the merge into the decoded base gives the
    trained logits; formats that know single experts see them so."""
    whole = tree(tmp_path, "qwen2_moe", train__steps=6, train__lr=0.1, base__quant=NF4)
    base = Path(whole["base"]["path"])
    load(base).save_pretrained(base, save_original_format=False)
    assert "model.layers.0.mlp.experts.down_proj" in load_file(base / "model.safetensors")
    assert train(World(), whole) == 0
    close_log()
    run = tmp_path / "run"
    merge_finished_run(run, tmp_path / "merged", into="decoded")
    probe = Probe.load_probe(run / "probe.safetensors")
    merged = compare_logits(load(tmp_path / "merged")(input_ids=probe.input_ids).logits, probe)
    print(f"merged into the decoded base: {merged.relative:.1e}")
    assert merged.relative < 0.05
    for name in ("mlx", "fp8"):  # of single experts, whose 40 columns these formats do not divide
        out = ["--format", name, "--out", str(tmp_path / name)]
        assert cli.main(["export", "--run", str(run), *out]) == 2
        close_log()
        text = capsys.readouterr().err
        assert "experts.0.down_proj.weight is an expert's with in_features 40" in text


REFUSED = {
    "adapter.use_dora is not for experts": {"adapter__use_dora": True},
    "adapter.init pissa is not for experts": {"adapter__init": "pissa"},
    "adapter.kind qalora is not for experts": {
        "adapter": {"kind": "qalora", "r": 4},
        "base__quant": {"kind": "int", "bits": 4, "group_size": 8},
    },
    "keep_gathered keeps whole blocks": {
        "engine": {"gather_experts": "routed", "keep_gathered": 1}
    },
    "tokens gathers no experts": {"engine": {"gather_experts": "tokens", "keep_gathered": 1}},
    "tokens multiplies experts where they rest": {
        "engine": {"gather_experts": "tokens", "cpu_offload": "params"}
    },
    "engine.gather_experts tokens multiplies rows of all ranks": {
        "engine": {"gather_experts": "tokens"},
        "train__exact": True,
    },
    "the experts of a mixture stay frozen": {"adapter": {"kind": "full"}},
    "is not quantized in advance": {
        "base__quant": {"kind": "int", "bits": 4, "group_size": 8, "solver": "gptq"}
    },
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused(message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = save_config(tmp_path, tree(tmp_path, "mixtral", **REFUSED[message]))
    assert cli.main(["train", "--config", str(config)]) == 2
    close_log()
    assert message in capsys.readouterr().err


OTHERS: dict[str, dict[str, Any]] = {
    "dropout without experts": {"target_modules": ["q_proj", "v_proj"], "dropout": 0.1},
    "bottleneck": {"kind": "bottleneck", "placement": "houlsby", "reduction_factor": 8},
    "parallel": {"kind": "bottleneck", "placement": "parallel", "reduction_factor": 8},
    "prefix": {"kind": "prefix", "num_virtual_tokens": 3},
    "prompt": {"kind": "prompt", "num_virtual_tokens": 3},
    "ptuning": {"kind": "ptuning", "num_virtual_tokens": 3},
    "partial": {"kind": "partial", "parts": ["norms"]},
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_methods_learn(name: str, tmp_path: Path) -> None:
    whole = tree(tmp_path, "qwen2_moe", adapter=OTHERS[name], base__quant=NF4)
    found, gradients = all_cases(World(), {name: whole})[name]
    assert len(set(found)) == 3 and gradients
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients.values())
