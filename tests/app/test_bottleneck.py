"""Bottleneck adapters on every engine: losses, resuming, the finished run, AdapterHub's library."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dist_peft.core.log import close_log
from dist_peft.core.world import World
from dist_peft.export.verify import Probe, compare_logits
from dist_peft.train.evaluate import inference_mode
from dist_peft.train.step_metrics import read_metrics
from tests.support import adapterhub_consumer
from tests.support.adapterhub import adapterhub
from tests.support.classification_runs import classifying_tree, save_classifier_base
from tests.support.command_line import lines
from tests.support.engines import (
    Outcomes,
    Runs,
    check_equals_single,
    check_resumes,
    outcomes_of,
    pairs,
)
from tests.support.equality import build
from tests.support.story_runs import losses, train
from tests.support.tiny_models import CONFIGS, save_model
from tests.support.tiny_runs import save_config, save_records, tiny_tree

pytestmark = pytest.mark.dist

INT4 = {"kind": "int", "bits": 4, "group_size": 32}
CASES: dict[str, dict[str, Any]] = {
    # three rows in a bottleneck: not divisible by the ranks
    "houlsby and norms": {
        "adapter": {
            "kind": "bottleneck",
            "placement": "houlsby",
            "reduction_factor": 20,
            "train_layernorm": True,
        },
        "base__quant": INT4,
    },
    "parallel, unpacked": {
        "adapter": {"kind": "bottleneck", "placement": "parallel"},
        "data__packing": False,
        "train__micro_batch": 2,
        "engine__activation_checkpointing": False,
    },
}
RUNS: Runs = {
    "fsdp2": (2, {"kind": "fsdp2"}, tuple(CASES)),
    "zero 2": (2, {"kind": "zero", "stage": 2}, ("houlsby and norms",)),
    "zero 3": (2, {"kind": "zero", "stage": 3}, ("houlsby and norms",)),
}
"""Ranks, engine, cases. Placement pfeiffer is in ``test_matrix``."""


def tree(directory: Path, case: str, **changes: Any) -> dict[str, Any]:
    """Four rows a step, of three short documents each where packed."""
    short = {
        "train__steps": 3,
        "train__global_batch": 4,
        "data__train": [str(save_records(directory / "twelve.jsonl", 12))],
        "data__packing": True,
        "data__seq_len": 32,
        "engine": {},
    }
    return tiny_tree(directory, **{**short, **CASES[case], **changes})


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    directory = tmp_path_factory.mktemp("bottleneck")
    singles = {case: tree(directory, case) for case in CASES}
    return outcomes_of(singles, RUNS)


@pytest.mark.parametrize(("run", "case"), pairs(RUNS))
def test_equals_single(outcomes: Outcomes, run: str, case: str) -> None:
    check_equals_single(outcomes, run, case)


def test_resumed_in_another_engine(tmp_path: Path) -> None:
    """Norms too: their changes are parameters like others."""
    check_resumes(tmp_path, partial(tree, tmp_path, "houlsby and norms"), 2)


# -- finished runs ---------------------------------------------------------------------------------


def test_finished_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In bfloat16: the loss falls, eval and inspect read it, merges are refused, another run can
    start from it."""
    case = "houlsby and norms"
    whole = tree(tmp_path, case, train__steps=6, base__compute_dtype="bfloat16", base__quant=None)
    assert train(World(), whole) == 0
    close_log()
    run = tmp_path / "run"
    found = losses(run)
    assert found[-1] < found[0]
    recorded = read_metrics(run / "metrics.jsonl")[-1].eval_loss

    printed = lines(["eval", "--config", str(run / "config.yaml"), "--run", str(run)], capsys)
    expected = {"eval_loss": pytest.approx(recorded, rel=1e-6), "step": 6}
    assert json.loads(printed.splitlines()[-1]) == expected

    described = lines(["inspect", str(run)], capsys)
    assert "bottleneck placement=houlsby reduction_factor=20.0 activation=swish" in described
    assert f"base         {tmp_path / 'base'}" in described and "targets" not in described

    out = ["--run", str(run), "--out", str(tmp_path / "out")]
    for argv in (["merge"], ["export", "--format", "mlx"]):
        message = lines([*argv, *out], capsys, code=2)
        assert "between its matrices is a nonlinearity" in message and "cannot be merged" in message
    message = lines(["export", "--format", "peft", *out], capsys, code=2)
    assert "already is in the format of AdapterHub's library" in message

    start = {**whole["adapter"], "init_from": str(run / "adapter")}
    config = save_config(tmp_path, {**whole, "adapter": start})
    printed = lines(["eval", "--config", str(config)], capsys)
    assert json.loads(printed.splitlines()[-1]) == {**expected, "step": 0}


REFUSED = {
    "unknown placement": ({"placement": "lora"}, "adapter.placement"),
    "unknown key": ({"r": 8}, "adapter.r"),
    "no factor": ({"reduction_factor": 0}, "adapter.reduction_factor"),
    "no adapter": ({"init_from": "nowhere"}, "nowhere has no adapter_config.json"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_configuration_is_refused(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes, message = REFUSED[case]
    config = save_config(tmp_path, tiny_tree(tmp_path, adapter={"kind": "bottleneck", **changes}))
    assert message in lines(["train", "--config", str(config)], capsys, code=2)


# -- AdapterHub ------------------------------------------------------------------------------------

READ_BY_ADAPTERHUB = [
    *(("llama-tied-bias", placement) for placement in ("pfeiffer", "houlsby", "parallel")),
    ("mistral", "pfeiffer"),
    ("qwen2", "parallel"),
    ("phi", "pfeiffer"),
    ("gemma2", "houlsby"),
]


def trained(tmp_path: Path, family: str, **settings: Any) -> tuple[Path, Probe]:
    """A base with the adapter of a run in it, and what the run computes."""
    adapter = {"kind": "bottleneck", **settings}
    whole = tiny_tree(tmp_path, adapter=adapter, train__lr=0.1, train__steps=6, save__every=0)
    save_model(CONFIGS[family], tmp_path / "base")
    assert train(World(), whole) == 0
    close_log()
    shutil.copytree(tmp_path / "run" / "adapter", tmp_path / "base" / "adapter")
    return tmp_path / "base", Probe.load_probe(tmp_path / "run" / "probe.safetensors")


@pytest.mark.parametrize(("family", "placement"), READ_BY_ADAPTERHUB)
def test_adapterhub_computes_the_same(family: str, placement: str, tmp_path: Path) -> None:
    """The run's own directory, loaded by AdapterHub's library: logits as trained."""
    adapterhub("-c", "pass")  # or skip
    base, probe = trained(tmp_path, family, placement=placement)
    assert (probe.trained - probe.before).abs().max() > 0.1
    ids = probe.input_ids[0].tolist()
    out = tmp_path / "out.npy"
    done = adapterhub(adapterhub_consumer.__file__, base, out, *ids)
    assert done.returncode == 0 and "adapters 1." in done.stdout, done.stderr
    found = compare_logits(torch.from_numpy(np.load(out)), probe)
    print(f"{family}, {placement}: {found.relative:.1e} of what training changed; {found}")
    assert found.relative < 1e-5


CLASSIFIES = """
import json, sys, adapters, numpy as np, torch, transformers as tf
base, directory, out, rows = sys.argv[1:]
model = tf.AutoModelForSequenceClassification.from_pretrained(base, dtype=torch.float32)
adapters.init(model)
model.load_adapter(directory, use_safetensors=True, set_active=True)
with torch.no_grad():
    np.save(out, model.eval()(input_ids=torch.tensor(json.loads(rows))).logits)
"""


@pytest.mark.parametrize(
    ("family", "placement"),
    [
        ("bert", "pfeiffer"),
        ("bert", "houlsby"),
        ("roberta", "pfeiffer"),
        ("roberta", "parallel"),
        ("modernbert", "pfeiffer"),
    ],
)
def test_adapterhub_computes_the_same_with_encoders(
    family: str, placement: str, tmp_path: Path
) -> None:
    """With the trained head. ``adapters.init`` alone changes what ModernBERT computes, by 3e-4."""
    adapterhub("-c", "pass")  # or skip
    base = save_classifier_base(tmp_path / "encoder", family)
    adapter = {"kind": "bottleneck", "placement": placement, "reduction_factor": 4}
    whole = classifying_tree(tmp_path, base, adapter=adapter, train__lr=0.02, train__steps=5)
    assert train(World(), whole) == 0
    close_log()
    probe = Probe.load_probe(tmp_path / "run" / "probe.safetensors")
    out, rows = tmp_path / "out.npy", json.dumps(probe.input_ids.tolist())
    done = adapterhub("-c", CLASSIFIES, base, tmp_path / "run" / "adapter", out, rows)
    assert done.returncode == 0, done.stderr
    found = compare_logits(torch.from_numpy(np.load(out)), probe)
    print(f"{family}, {placement}: {found}")
    assert found.relative < (5e-3 if family == "modernbert" else 1e-5)


def test_adapterhub_refuses_norms_that_it_would_lose(tmp_path: Path) -> None:
    adapterhub("-c", "pass")
    base, _ = trained(tmp_path, "llama-tied-bias", train_layernorm=True)
    done = adapterhub(adapterhub_consumer.__file__, base, tmp_path / "out.npy", 4, 5)
    assert done.returncode != 0 and "bottleneck_and_layernorm" in done.stderr


WRITES = """
import sys, adapters, numpy as np, torch, transformers as tf
base, out, preset, *ids = sys.argv[1:]
model = tf.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
adapters.init(model)
model.add_adapter("other", config=preset, set_active=True)
for name, parameter in model.named_parameters():
    if ".adapters." in name:
        torch.nn.init.normal_(parameter, std=0.3)
with torch.no_grad():
    np.save(out + ".npy", model.eval()(input_ids=torch.tensor([[int(i) for i in ids]])).logits)
model.save_adapter(out, "other", use_safetensors=True)
"""


@pytest.mark.parametrize(
    ("preset", "placement"),
    [("seq_bn", "pfeiffer"), ("double_seq_bn", "houlsby"), ("par_bn", "parallel")],
)
def test_adapterhubs_own_adapter_is_read(preset: str, placement: str, tmp_path: Path) -> None:
    out = tmp_path / "theirs"
    start = {"kind": "bottleneck", "placement": placement, "init_from": str(out)}
    whole = tiny_tree(tmp_path, adapter=start)
    save_model(CONFIGS["llama-tied-bias"], tmp_path / "base")
    ids = [4, 9, 30, 31, 7, 50]
    done = adapterhub("-c", WRITES, tmp_path / "base", out, preset, *ids)
    assert done.returncode == 0, done.stderr
    _, built, _, _ = build(World(), whole)
    with inference_mode(built.model):
        logits = built.model(input_ids=torch.tensor([ids]), use_cache=False).logits
    error = (logits - torch.from_numpy(np.load(f"{out}.npy"))).abs().max()
    print(f"{preset}: max error {error:.1e} of logits up to {logits.abs().max():.2f}")
    assert error < 1e-5
