"""IA3 as runs: every engine, a base with biases, resuming at other ranks, merge and export."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftModel

from dist_peft.app import cli
from dist_peft.core.log import close_log
from dist_peft.core.world import World
from dist_peft.export.verify import Probe, compare_logits
from tests.support.classification_runs import classifying_tree, save_classifier_base
from tests.support.dist import run_ranks
from tests.support.engines import Outcomes, Runs, check_equals_single, outcomes_of, pairs
from tests.support.story_runs import losses, train
from tests.support.tiny_models import CONFIGS, save_model
from tests.support.tiny_runs import save_words, tiny_tree

pytestmark = pytest.mark.dist

NF4 = {"kind": "nf4"}
INT3 = {"kind": "int", "bits": 3, "group_size": 8}

CASES: dict[str, dict[str, Any]] = {
    "nf4": {"base__quant": NF4, "family": "llama"},
    "int3, all-linear": {
        "base__quant": INT3,
        "adapter": {"kind": "ia3", "target_modules": "all-linear"},
        "family": "qwen2",  # biases of keys and values are rescaled, too
    },
}
RUNS: Runs = {
    # vectors of 32 and 104 numbers: three ranks hold different numbers of them
    "fsdp2, 3 ranks": (3, {"kind": "fsdp2"}, tuple(CASES)),
    "zero 3": (3, {"kind": "zero", "stage": 3}, ("nf4",)),
}


def tree(directory: Path, case: str, **changes: Any) -> dict[str, Any]:
    directory.mkdir(exist_ok=True)
    settings = {"adapter": {"kind": "ia3"}, **CASES[case], **changes}
    family = settings.pop("family")
    settings = {"train__global_batch": 6, "train__lr": 3e-2, **settings}
    made = tiny_tree(directory, **settings)
    if family != "llama":
        save_model(CONFIGS[family], directory / family)
        save_words(directory / family)
        made["base"] = {**made["base"], "path": str(directory / family)}
    return made


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    directory = tmp_path_factory.mktemp("ia3")
    return outcomes_of({case: tree(directory / case, case) for case in CASES}, RUNS)


@pytest.mark.parametrize(("run", "case"), pairs(RUNS))
def test_equals_single(outcomes: Outcomes, run: str, case: str) -> None:
    """fp32 losses and gradients of the vectors are those of one process; losses fall."""
    check_equals_single(outcomes, run, case)


def test_resumed_at_other_ranks(tmp_path: Path) -> None:
    def named(name: str) -> dict[str, Any]:
        return tree(tmp_path, "nf4", save={"dir": str(tmp_path / name), "every": 0})

    assert train(World(), named("whole")) == 0
    assert run_ranks(train, 2, named("cut"), 2) == [75, 75]
    assert train(World(), named("cut")) == 0
    expected = torch.tensor(losses(tmp_path / "whole"))
    torch.testing.assert_close(torch.tensor(losses(tmp_path / "cut")), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("case", CASES)
def test_finished_run(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(World(), tree(tmp_path, case)) == 0
    run, out = str(tmp_path / "run"), tmp_path / "out"
    probe = Probe.load_probe(tmp_path / "run" / "probe.safetensors")
    merge = ["merge", "--run", run, "--out", str(out), "--base", "decoded", "--dtype", "float32"]
    verbs = (
        ["inspect", run],
        ["export", "--run", run, "--format", "peft", "--out", str(tmp_path / "peft")],
        merge,
    )
    printed = ""
    for verb in verbs:
        code = cli.main(verb)
        captured = capsys.readouterr()
        assert code == 0, captured.err
        printed += captured.out
    close_log()
    assert "IA3 feedforward_modules=" in printed
    model = tf.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(input_ids=probe.input_ids).logits
    difference = compare_logits(logits, probe)
    assert difference.relative < 1e-4, difference


def test_adapter_beside_an_integer_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """PEFT has IA3 on linears of compressed-tensors, and none on those of GPTQ."""
    assert train(World(), tree(tmp_path, "int3, all-linear")) == 0
    export = ["export", "--run", str(tmp_path / "run"), "--format"]
    capsys.readouterr()
    assert cli.main([*export, "gptq", "--out", str(tmp_path / "gptq")]) == 2
    assert "on which PEFT does not support this method; choose" in capsys.readouterr().err
    assert not (tmp_path / "gptq").exists()
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    assert cli.main([*export, "compressed-tensors", "--out", str(tmp_path / "out")]) == 0
    close_log()
    assert "max error 0.00e+00" in capsys.readouterr().err


def test_classifier(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The head is trained with the vectors; PEFT and the merged model have both."""
    base = save_classifier_base(tmp_path / "bert", "bert")
    section = {
        "kind": "ia3",
        "target_modules": ["key", "value", "output.dense"],
        "feedforward_modules": ["output.dense"],
    }
    made = classifying_tree(tmp_path, base, adapter=section, train__lr=3e-2)
    assert train(World(), made) == 0
    run, out = tmp_path / "run", tmp_path / "out"
    argv = ["merge", "--run", str(run), "--out", str(out), "--dtype", "float32"]
    assert cli.main(argv) == 0, capsys.readouterr().err
    close_log()
    auto = tf.AutoModelForSequenceClassification
    merged = auto.from_pretrained(out, dtype=torch.float32).eval()
    plain = auto.from_pretrained(base, num_labels=2, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(plain, run / "adapter").eval()
    ids = torch.randint(4, 97, (3, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, expected = merged(input_ids=ids).logits, adapted(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
