"""Classifiers on every engine: losses, resuming, finished runs, and who loads them."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

from dist_peft.app.model_setup import load_training_state
from dist_peft.core.log import close_log
from dist_peft.core.world import World
from dist_peft.data.classification import LabelledBatch
from dist_peft.export.verify_bitsandbytes import patch_bitsandbytes_layers
from dist_peft.train.checkpoint import CheckpointManager
from dist_peft.train.evaluate import inference_mode
from dist_peft.train.objective import ClassificationObjective
from dist_peft.train.step_metrics import read_metrics
from tests.support.adapterhub import adapterhub
from tests.support.classification_runs import (
    classifying_tree,
    save_classifier_base,
    save_pairs,
    source,
)
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
from tests.support.story_runs import NF4, train
from tests.support.tiny_runs import save_config

pytestmark = pytest.mark.dist

INT4 = {"kind": "int", "bits": 4, "group_size": 8}
CASES: dict[str, tuple[str, Any, dict[str, Any]]] = {
    # the pooler is new
    "bert, lora": (
        "bert",
        tf.AutoModelForMaskedLM,
        {"adapter": {"r": 4, "dropout": 0.1}, "base__quant": NF4},
    ),
    "roberta, qalora": (
        "roberta",
        tf.AutoModel,
        {"adapter": {"kind": "qalora", "r": 4}, "base__quant": INT4},
    ),
    "modernbert, partial": (
        "modernbert",
        tf.AutoModelForMaskedLM,
        {
            "adapter": {"kind": "partial", "parts": ["norms"], "last_blocks": 1},
            "base__quant": NF4,
            "engine__activation_checkpointing": False,
        },
    ),
    "llama, bottleneck": (
        "llama-tied-bias",
        None,
        {"adapter": {"kind": "bottleneck"}, "base__quant": NF4},
    ),
    "llama, dora": ("llama", None, {"adapter": {"r": 4, "use_dora": True}}),
    # its experts too
    "mixtral, lora": ("mixtral", None, {"adapter": {"r": 4}, "base__quant": NF4}),
}
RUNS: Runs = {
    "fsdp2": (2, {"kind": "fsdp2"}, tuple(CASES)[:4]),
    "zero 2": (2, {"kind": "zero", "stage": 2}, ("bert, lora",)),
    "zero 3": (2, {"kind": "zero", "stage": 3}, ("bert, lora", "modernbert, partial")),
}


def tree(directory: Path, case: str, **changes: Any) -> dict[str, Any]:
    """Two tasks, of two and of three classes, in one head. A step takes all 21 rows, so that of two
    ranks one has a filler row."""
    family, auto, own = CASES[case]
    base = directory / case.split(",")[0]
    if not base.exists():
        save_classifier_base(base, family, auto)
    three = ["a", "b", "c"]
    more = source(save_pairs(directory / "three.tsv", 9, three), labels=three, name="three")
    first = source(save_pairs(directory / "pairs.tsv"), name="two")
    held = source(save_pairs(directory / "held.tsv", 5), name="two")
    both = {"data__train": [first, more], "data__eval": [held, {**more, "labels": []}]}
    both |= {"train__global_batch": 21, "train__micro_batch": 4}
    return classifying_tree(directory, base, **{**both, "engine": {}, **own, **changes})


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    directory = tmp_path_factory.mktemp("classification")
    singles = {case: tree(directory, case) for case in CASES}
    return outcomes_of(singles, RUNS)


@pytest.mark.parametrize(("run", "case"), pairs(RUNS))
def test_equals_single(outcomes: Outcomes, run: str, case: str) -> None:
    check_equals_single(outcomes, run, case)


def test_resumed_in_another_engine(tmp_path: Path) -> None:
    """The head, too."""
    check_resumes(tmp_path, partial(tree, tmp_path, "bert, lora"), 2)


# -- finished runs ---------------------------------------------------------------------------------


def trained_logits(world: World, config: dict[str, Any]) -> tuple[dict[str, torch.Tensor], Any]:
    """Padded inputs of held-out pairs, as training gives them, and the trained model's logits."""
    _, built, loaders, _ = build(world, config)
    checkpoints = CheckpointManager(Path(config["save"]["dir"]) / "checkpoints", 1, world)
    path = checkpoints.select_checkpoint("auto")
    assert path is not None and loaders.eval is not None
    load_training_state(built, checkpoints, path, checkpoints.read_position(path).step)
    batch = loaders.eval.load_all_sequential()[0]
    assert isinstance(batch, LabelledBatch) and not batch.attention_mask.all()
    inputs = ClassificationObjective().build_inputs(built.model, batch, torch.device("cpu"))
    with inference_mode(built.model):
        return inputs, built.model(**inputs).logits


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    "case", ["bert, lora", "modernbert, partial", "llama, dora", "mixtral, lora"]
)
def test_finished_run(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is merged, and the adapter in PEFT, give the trained logits; eval reads the run."""
    save = {"dir": str(tmp_path / "run"), "every": 0}
    whole = tree(tmp_path, case, train__steps=4, base__quant=None, save=save)
    assert train(World(), whole) == 0
    close_log()
    run, out = tmp_path / "run", tmp_path / "out"
    inputs, expected = trained_logits(World(), whole)

    recorded = read_metrics(run / "metrics.jsonl")
    last, first = recorded[-1], recorded[0]
    printed = json.loads(
        lines(["eval", "--config", str(run / "config.yaml"), "--run", str(run)], capsys)
        .strip()
        .splitlines()[-1]
    )
    assert printed["eval_accuracy"] == last.eval_accuracy and 0 < last.eval_accuracy <= 1
    assert printed["eval_macro_f1_by_task"] == last.eval_macro_f1_by_task
    assert printed["eval_loss"] == pytest.approx(last.eval_loss, rel=1e-6)
    assert set(printed["eval_by_task"]) == {"two", "three"}
    assert first.eval_accuracy_before is not None and first.loss > last.loss
    assert "Held-out accuracy" in (run / "report.html").read_text()

    argv = ["--run", str(run), "--out", str(out)]
    lines(["merge", *argv], capsys)
    merged = tf.AutoModelForSequenceClassification.from_pretrained(out, dtype=torch.bfloat16).eval()
    assert merged.config.id2label[3] == "three/b" and merged.config.num_labels == 5
    assert tf.AutoTokenizer.from_pretrained(out).pad_token == "[PAD]"
    with torch.no_grad():
        close(merged(**inputs).logits.float(), expected, 0.1)
        close(merged.float()(**inputs).logits, expected, 0.03)
    argv[-1] = str(tmp_path / "other")
    message = lines(["export", "--format", "mlx", *argv], capsys, code=2)
    assert "trained a classifier, and format mlx is for language models: mlx-lm" in message
    if "partial" in case:
        return
    base = tf.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / case.split(",")[0], num_labels=5
    )
    reloaded = peft.PeftModel.from_pretrained(base, run / "adapter").eval()
    assert type(reloaded) is peft.PeftModelForSequenceClassification
    with torch.no_grad():
        close(reloaded(**inputs).logits, expected)


PACKED = {
    "hf-metal --bits 8 --group-size 32": (".scales", 12, 0.05),
    "compressed-tensors --merge --lossy --bits 8 --group-size 32": (".weight_packed", 12, 0.05),
    "fp8 --group-size 32": (".weight_scale_inv", 8, 0.2),
    "fp8 --scales row": (".weight_scale", 14, 0.2),
    "mxfp4": (".weight_packed", 12, 0.6),
    "bnb-nf4": (".quant_map", 14, 0.6),
}
"""Arguments after ``--format`` -> end of a name that each packed linear has, how many of the 14 are
packed (104 columns or rows are no multiple of 32), tolerance of logits of about 1."""


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, dict[str, torch.Tensor], torch.Tensor]:
    """A run, tokens, and the trained logits of these."""
    directory = tmp_path_factory.mktemp("packed")
    save = {"dir": str(directory / "run"), "every": 0}
    whole = tree(directory, "llama, dora", train__steps=4, base__quant=None, save=save)
    assert train(World(), whole) == 0
    close_log()
    return directory / "run", *trained_logits(World(), whole)


@pytest.mark.parametrize("words", PACKED)
def test_packed_export_is_loaded_as_a_classifier(
    words: str,
    finished: tuple[Path, dict[str, torch.Tensor], torch.Tensor],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (run, inputs, expected), (ending, count, tolerance) = finished, PACKED[words]
    out = tmp_path / "out"
    argv = ["export", "--run", str(run), "--out", str(out), "--no-verify", "--format"]
    lines([*argv, *words.split()], capsys)
    names = load_file(out / "model.safetensors")
    assert sum(name.endswith(ending) for name in names) == count
    method = json.loads((out / "config.json").read_text())["quantization_config"]["quant_method"]
    how = {
        "compressed-tensors": tf.CompressedTensorsConfig(dequantize=True),
        "fp8": tf.FineGrainedFP8Config(dequantize=True),
    }
    loaded = tf.AutoModelForSequenceClassification.from_pretrained(
        out, device_map="cpu", **({"quantization_config": how[method]} if method in how else {})
    ).eval()
    assert loaded.config.id2label[3] == "three/b" and loaded.config.num_labels == 5
    if method == "bitsandbytes":
        patch_bitsandbytes_layers(loaded)
    with torch.no_grad():
        close(loaded(**inputs).logits.float(), expected, tolerance)


REFUSED = {
    "encoder as language model": (
        {"base__head": "lm"},
        "base.head classifier goes with data of format: classification",
    ),
    "packing": ({"data__packing": True}, "packing: true is not for classification"),
    "virtual tokens": ({"adapter": {"kind": "prompt"}}, "adapter.kind prompt puts virtual tokens"),
    "calibration": (
        {"base__quant": {"kind": "int", "group_size": 8, "solver": "gptq"}},
        "calibrates on documents",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_configuration_is_refused(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes, message = REFUSED[case]
    config = save_config(tmp_path, tree(tmp_path, "bert, lora", **changes))
    assert message in lines(["train", "--config", str(config)], capsys, code=2)


LOADS = """
import sys, adapters, numpy as np, torch, transformers as tf
base, adapter, inputs, out, classes = sys.argv[1:]
auto = tf.AutoModelForSequenceClassification
model = auto.from_pretrained(base, num_labels=int(classes), dtype=torch.float32)
adapters.init(model)
model.load_adapter(adapter, set_active=True, use_safetensors=True)
with torch.no_grad():
    logits = model.eval()(**{n: torch.from_numpy(a) for n, a in np.load(inputs).items()}).logits
np.save(out, logits)
"""


@pytest.mark.parametrize("case", ["bert, lora", "roberta, qalora", "llama, bottleneck"])
def test_adapterhub_computes_the_same(case: str, tmp_path: Path) -> None:
    """One ``load_adapter`` of the library takes the adapter and the head."""
    adapterhub("-c", "pass")  # or skip
    save = {"dir": str(tmp_path / "run"), "every": 0}
    adapter = {"kind": "bottleneck", "placement": "houlsby"}
    whole = tree(tmp_path, case, save=save, base__quant=None, adapter=adapter)
    assert train(World(), whole) == 0
    close_log()
    inputs, expected = trained_logits(World(), whole)
    np.savez(tmp_path / "in.npz", **{name: value.numpy() for name, value in inputs.items()})
    paths = [tmp_path / name for name in (case.split(",")[0], "run/adapter", "in.npz", "out.npy")]
    done = adapterhub("-c", LOADS, *paths, expected.shape[1])
    assert done.returncode == 0, done.stderr
    close(torch.from_numpy(np.load(tmp_path / "out.npy")), expected)
