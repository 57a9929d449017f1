"""AdapterFusion on every engine: losses, the penalty, resuming, the finished run, AdapterHub."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dist_peft.core.errors import UserError
from dist_peft.core.log import close_log
from dist_peft.core.world import World
from dist_peft.export.verify import Probe, compare_logits
from dist_peft.train.evaluate import inference_mode
from dist_peft.train.step_metrics import read_metrics
from tests.support.adapterhub import adapterhub
from tests.support.classification_runs import classifying_tree, save_classifier_base
from tests.support.command_line import lines
from tests.support.dist import run_ranks
from tests.support.engines import Outcomes, Runs, check_equals_single, outcomes_of, pairs
from tests.support.equality import Outcome, all_cases, build
from tests.support.fusion_runs import NAMES, changed, fusion_tree, train_adapters
from tests.support.story_runs import NF4, losses, train
from tests.support.tiny_models import CONFIGS, ENCODERS, save_model
from tests.support.tiny_runs import save_config, tiny_tree

pytestmark = pytest.mark.dist

CASES: dict[str, dict[str, Any]] = {
    # five rows a step: on two ranks one of the six micro-batches is a filler
    "pfeiffer": {"adapter__regularization": 0.5, "base__quant": NF4},
    "houlsby": {
        "adapter__dropout": 0.1,
        "train__micro_batch": 2,
        "engine": {"activation_checkpointing": False},
    },
}
RUNS: Runs = {
    "fsdp2": (2, {"kind": "fsdp2"}, (*CASES, "bert")),
    "zero 2": (2, {"kind": "zero", "stage": 2}, ("pfeiffer",)),
    "zero 3": (2, {"kind": "zero", "stage": 3}, ("pfeiffer",)),
}


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Each case on one process; stage 1 has been run."""
    directory = tmp_path_factory.mktemp("fusion")
    cases = {case: fusion_tree(directory, case, **changes) for case, changes in CASES.items()}
    base = save_classifier_base(directory / "encoder", "bert")
    encoder = classifying_tree(directory, base, train__global_batch=5, base__quant=NF4)
    fused = train_adapters(directory, encoder)
    return {**cases, "bert": {**encoder, "adapter": {"kind": "fusion", "adapters": fused}}}


@pytest.fixture(scope="module")
def outcomes(trees: dict[str, dict[str, Any]]) -> Outcomes:
    return outcomes_of(trees, RUNS)


@pytest.mark.parametrize(("run", "case"), pairs(RUNS))
def test_equals_single(outcomes: Outcomes, run: str, case: str) -> None:
    """Losses, and gradients with the penalty, are those of one process."""
    check_equals_single(outcomes, run, case)


def test_only_the_fusion_learns(outcomes: dict[str, list[dict[str, Outcome]]]) -> None:
    """Neither the adapters nor, without dropout, the keys' bias, which cancels."""
    assert not any(name.endswith("key_bias") for name in outcomes["single"][0]["pfeiffer"][1])
    _, gradients = outcomes["single"][0]["houlsby"]
    own = ("query_weight", "query_bias", "key_weight", "key_bias", "value_change")
    sites = ("attention_adapters", "output_adapters")
    assert set(gradients) == {
        f"model.layers.{i}.{site}.{name}" for i in (0, 1) for site in sites for name in own
    }


def test_penalty_counts_once(trees: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    """In three micro-batches, recomputed: V's gradient grows by 2 lambda (V - I), others do not."""
    start = changed(
        trees["pfeiffer"], save__dir=str(tmp_path / "run"), train__lr=0.05, train__micro_batch=2
    )
    assert train(World(), start) == 0
    close_log()
    written = load_file(tmp_path / "run" / "adapter" / "model_adapter_fusion.safetensors")
    own = str(tmp_path / "run" / "adapter")
    here = changed(start, adapter__init_from=own, train__steps=1, train__lr=1e-30)  # as good as 0
    both = all_cases(World(), {"with": here, "without": changed(here, adapter__regularization=0)})
    with_penalty, without = both["with"][1], both["without"][1]
    for name, gradient in with_penalty.items():
        growth = gradient - without[name]
        if not name.endswith("value_change"):
            assert torch.equal(gradient, without[name])
            continue
        place = name.removesuffix(".value_change")
        value = written[f"{place}.adapter_fusion_layer.rte,mrpc.value.weight"]
        torch.testing.assert_close(growth, 2 * 0.5 * (value - torch.eye(64)), rtol=1e-4, atol=1e-6)
        assert growth.abs().max() > 0.01


def test_resumed_in_another_engine(trees: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    """The same losses and the same measured attention, whatever ranks were in between; with other
    adapters in the same place a run does not go on."""

    def run(name: str, **changes: Any) -> dict[str, Any]:
        save = {"dir": str(tmp_path / name), "every": 0}
        return changed(trees["pfeiffer"], save=save, train__steps=4, **changes)

    assert train(World(), run("whole")) == 0
    cut = run("cut", engine={"kind": "fsdp2"})
    assert run_ranks(train, 2, cut, 2) == [75, 75]
    assert run_ranks(train, 2, cut) == [0, 0]
    own = Path(cut["adapter"]["adapters"][0])
    moved = shutil.copytree(own, tmp_path / "moved")
    tensors = load_file(moved / "adapter.safetensors")
    save_file({k: v + 1 for k, v in tensors.items()}, own / "adapter.safetensors")
    with pytest.raises(UserError, match=r"contents of adapter\.adapters is"):
        train(World(), run("cut"))
    close_log()
    shutil.copy(moved / "adapter.safetensors", own / "adapter.safetensors")
    expected, found = losses(tmp_path / "whole"), losses(tmp_path / "cut")
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-6, atol=0)
    one, two = (
        json.loads((tmp_path / n / "fusion_attention.json").read_text()) for n in ("whole", "cut")
    )
    torch.testing.assert_close(
        torch.tensor(one.pop("attention")), torch.tensor(two.pop("attention"))
    )
    assert one == two and one["tokens"] == 28 and one["counted"] == "target tokens"


# -- finished runs ---------------------------------------------------------------------------------


def test_finished_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The loss falls, eval and inspect read it, merges are refused, another run starts from it."""
    held_out = [str(tmp_path / "twelve.jsonl"), {"path": str(tmp_path / "eval.jsonl")}]
    tree = fusion_tree(tmp_path, train__steps=8, data__eval=held_out, train__lr=0.02)
    assert train(World(), tree) == 0
    close_log()
    run = tmp_path / "run"
    last = read_metrics(run / "metrics.jsonl")
    assert last[-1].eval_loss is not None and last[0].eval_loss_before is not None
    assert last[-1].eval_loss < last[0].eval_loss_before
    found = json.loads((run / "fusion_attention.json").read_text())
    assert found["adapters"] == list(NAMES) and set(found["by_task"]) == {"twelve", "eval"}
    assert "Attention to the fused adapters" in (run / "report.html").read_text()

    printed = lines(["eval", "--config", str(run / "config.yaml"), "--run", str(run)], capsys)
    recorded = pytest.approx(last[-1].eval_loss, rel=1e-6)
    assert json.loads(printed.splitlines()[-1])["eval_loss"] == recorded
    described = lines(["inspect", str(run)], capsys)
    assert "fusion of rte, mrpc" in described

    out = ["--run", str(run), "--out", str(tmp_path / "out")]
    assert "a fusion of bottlenecks" in lines(["merge", *out], capsys, code=2)
    message = lines(["export", "--format", "peft", *out], capsys, code=2)
    assert "adapter.kind fusion, which PEFT does not have" in message

    adapters = [str(run / "adapter" / name) for name in NAMES]
    own = {"kind": "fusion", "adapters": adapters, "init_from": str(run / "adapter")}
    config = save_config(tmp_path, {**tree, "adapter": own})
    printed = lines(["eval", "--config", str(config)], capsys)
    assert json.loads(printed.splitlines()[-1])["eval_loss"] == recorded


REFUSED = {
    "one": ({"adapters": ["a"]}, "adapter.adapters"),
    "twice": ({"adapters": ["a", "b/a/adapter"]}, "two of adapters are called a"),
    "a name that is none": ({"adapters": ["a", "b.c"]}, "name 'b.c' of b.c must be of letters"),
    "nowhere": (
        {"adapters": ["nowhere", "b"]},
        "nowhere has no adapter_config.json; give the adapter/ of a finished run",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_configuration_is_refused(
    case: str,
    trees: dict[str, dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings, message = REFUSED[case]
    tree = changed(trees["pfeiffer"], adapter={"kind": "fusion", **settings})
    config = save_config(tmp_path, changed(tree, save__dir=str(tmp_path / "run")))
    assert message in lines(["train", "--config", str(config)], capsys, code=2)


# -- AdapterHub ------------------------------------------------------------------------------------

COMPUTES = """
import json, pathlib, sys, adapters, numpy as np, torch, transformers as tf
base, directory, out, kind, *rows = sys.argv[1:]
model = getattr(tf, kind).from_pretrained(base, dtype=torch.float32)
adapters.init(model)
directory = pathlib.Path(directory)
for name in json.loads((directory / "adapter_fusion_config.json").read_text())["adapter_names"]:
    model.load_adapter(str(directory / name), use_safetensors=True)
model.load_adapter_fusion(str(directory), use_safetensors=True, set_active=True)
ids = torch.tensor(json.loads(rows[0]))
with torch.no_grad():
    np.save(out, model.eval()(input_ids=ids).logits)
"""


@pytest.mark.parametrize(
    ("family", "placement"),
    [
        ("llama-tied-bias", "pfeiffer"),
        ("mistral", "houlsby"),
        ("phi", "pfeiffer"),
        ("bert", "pfeiffer"),  # with its head
    ],
)
def test_adapterhub_computes_the_same(family: str, placement: str, tmp_path: Path) -> None:
    """The run's own directory, loaded by AdapterHub's library: logits as trained."""
    adapterhub("-c", "pass")  # or skip
    if family in ENCODERS:
        base, kind = save_classifier_base(tmp_path / "encoder", family), "SequenceClassification"
        tree = classifying_tree(tmp_path, base, train__lr=0.02)
        fused = train_adapters(tmp_path, tree, placement=placement)
        tree["adapter"] = {"kind": "fusion", "adapters": fused}
    else:
        tree = fusion_tree(tmp_path, placement, family, train__lr=0.02)
        base, kind = tmp_path / "base", "CausalLM"
    assert train(World(), tree) == 0
    close_log()
    probe = Probe.load_probe(tmp_path / "run" / "probe.safetensors")
    rows, out = json.dumps(probe.input_ids.tolist()), tmp_path / "out.npy"
    run = tmp_path / "run" / "adapter"
    done = adapterhub("-c", COMPUTES, base, run, out, f"AutoModelFor{kind}", rows)
    assert done.returncode == 0, done.stderr
    found = compare_logits(torch.from_numpy(np.load(out)), probe)
    print(f"{family}, {placement}: {found}")
    assert found.relative < 1e-4


WRITES = """
import sys, adapters, numpy as np, torch, transformers as tf
from adapters.composition import Fuse
base, out, *ids = sys.argv[1:]
model = tf.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
adapters.init(model)
for name, factor in (("one", 8), ("two", 16)):
    model.add_adapter(name, config=adapters.SeqBnConfig(reduction_factor=factor))
setup = Fuse("one", "two")
torch.manual_seed(0)
model.add_adapter_fusion(setup, "dynamic", set_active=True)
for name, parameter in model.named_parameters():
    if ".adapters." in name or ".adapter_fusion_layer." in name:
        torch.nn.init.normal_(parameter, std=0.3)
with torch.no_grad():
    np.save(out + ".npy", model.eval()(input_ids=torch.tensor([[int(i) for i in ids]])).logits)
model.save_adapter_fusion(out, setup, use_safetensors=True)
for name in ("one", "two"):
    model.save_adapter(f"{out}/{name}", name, use_safetensors=True)
"""


def test_adapterhubs_own_fusion_is_read(tmp_path: Path) -> None:
    out, ids = tmp_path / "theirs", [4, 9, 30, 31, 7, 50]
    adapters = [str(out / "one"), str(out / "two")]
    start = {"kind": "fusion", "adapters": adapters, "init_from": str(out)}
    whole = tiny_tree(tmp_path, adapter=start)
    save_model(CONFIGS["llama-tied-bias"], tmp_path / "base")
    done = adapterhub("-c", WRITES, tmp_path / "base", out, *ids)
    assert done.returncode == 0, done.stderr
    _, built, _, _ = build(World(), whole)
    with inference_mode(built.model):
        logits = built.model(input_ids=torch.tensor([ids]), use_cache=False).logits
    error = (logits - torch.from_numpy(np.load(f"{out}.npy"))).abs().max()
    print(f"fusion: max error {error:.1e} of logits up to {logits.abs().max():.2f}")
    assert error < 1e-5
