"""Prompt tuning, P-tuning and prefix-tuning as runs: every engine, PEFT, resuming, verbs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftConfig, PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dist_peft.app import cli
from dist_peft.core.log import close_log
from dist_peft.core.world import World
from dist_peft.export.verify import Probe, compare_logits
from dist_peft.train.step_metrics import read_metrics
from tests.support.dist import run_ranks
from tests.support.engines import Outcomes, Runs, check_equals_single, outcomes_of, pairs
from tests.support.story_runs import NF4, losses, train
from tests.support.tiny_runs import save_records, tiny_tree

pytestmark = pytest.mark.dist

INT4 = {"kind": "int", "bits": 4, "group_size": 32}
TEXT = {"init": "text", "init_text": "w5 w6 w7"}
LSTM = {"encoder": "lstm", "encoder_hidden_size": 16}

CASES: dict[str, dict[str, Any]] = {
    # two virtual tokens: fewer rows than ranks
    "prompt": {"adapter": {"kind": "prompt", "num_virtual_tokens": 2, **TEXT}, "base__quant": NF4},
    "ptuning": {
        "adapter": {"kind": "ptuning", "num_virtual_tokens": 4, "dropout": 0.1, **LSTM},
        "base__quant": INT4,
    },
    "prefix": {
        "adapter": {"kind": "prefix", "num_virtual_tokens": 2, "dropout": 0.1},
        "base__quant": NF4,
    },
    "prefix, unpacked": {
        "adapter": {"kind": "prefix", "num_virtual_tokens": 5},
        "data__packing": False,
        "train__micro_batch": 2,
        "engine__activation_checkpointing": False,
    },
    "placed": {
        "adapter": {"kind": "ptuning", "num_virtual_tokens": 3, "pseudo_token": "<p>"},
        "base__quant": NF4,
    },
    "predicted inputs": {
        "adapter": {"kind": "prefix", "num_virtual_tokens": 3, "encoder_hidden_size": 8},
        "train__scheduled_sampling": {"c": 0.1, "k": 0.6, "temperature": 0.8},
        "engine__reduce_gradients": "step",
    },
}
RUNS: Runs = {
    "fsdp2, 2 ranks": (2, {"kind": "fsdp2"}, tuple(CASES)),
    "zero 2": (2, {"kind": "zero", "stage": 2}, ("ptuning", "prefix")),
    "zero 3": (3, {"kind": "zero", "stage": 3}, ("ptuning", "predicted inputs")),
}
"""Ranks, engine, cases: what ``test_matrix`` has not."""


def tree(directory: Path, case: str, **changes: Any) -> dict[str, Any]:
    """Four rows, each of which holds three short documents where packed; all are in each step."""
    short = {
        "train__steps": 3,
        "train__global_batch": 4,
        "data__train": [str(save_records(directory / "twelve.jsonl", 12))],
        "data__packing": True,
        "data__seq_len": 32,
        "engine": {},
    }
    made = tiny_tree(directory, **{**short, **CASES[case], **changes})
    if case == "placed":
        save_pseudo_token(directory / "base")
        for name in ("train", "eval"):
            sources = [{"path": path, "template": TEMPLATE} for path in made["data"][name]]
            made["data"] = {**made["data"], name: sources}
    return made


TEMPLATE = "<p> {prompt} <p> <p> "


def save_pseudo_token(directory: Path) -> None:
    """The tokenizer of ``tiny`` with the special token <p> in the place of w96."""
    words = {f"w{i}": i for i in range(96)} | {"<p>": 96}
    inner = Tokenizer(models.WordLevel(words, unk_token="w3"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token="w2",
        bos_token="w1",
        pad_token="w0",
        unk_token="w3",
        additional_special_tokens=["<p>"],
    ).save_pretrained(directory)


def _made(directory: Path) -> Path:
    directory.mkdir()
    return directory


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    directory = tmp_path_factory.mktemp("virtual")
    singles = {case: tree(_made(directory / case), case) for case in CASES}
    return outcomes_of(singles, RUNS)


@pytest.mark.parametrize(("run", "case"), pairs(RUNS))
def test_equals_single(outcomes: Outcomes, run: str, case: str) -> None:
    """fp32 losses within 1e-6 of one process's, gradients of the encoder likewise; losses fall."""
    check_equals_single(outcomes, run, case)


# -- finished runs ---------------------------------------------------------------------------------


def lines(argv: list[str], capsys: pytest.CaptureFixture[str], code: int = 0) -> str:
    """What a verb prints, or its error for another exit code."""
    assert cli.main(argv) == code
    close_log()
    captured = capsys.readouterr()
    return captured.out if code == 0 else captured.err


def evaluated(run: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    printed = lines(["eval", "--config", str(run / "config.yaml"), "--run", str(run)], capsys)
    found: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return found


@pytest.mark.usefixtures("native_products")
@pytest.mark.parametrize("case", ["prompt", "ptuning", "prefix"])
def test_finished_run(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On a base in bfloat16: the loss falls, PEFT computes the same, every verb works."""
    dtypes = {"base__compute_dtype": "bfloat16", "base__quant": None}
    whole = tree(tmp_path, case, train__steps=6, **dtypes)
    assert train(World(), whole) == 0
    close_log()
    run = tmp_path / "run"
    found = losses(run)
    assert found[-1] < found[0]

    out = tmp_path / "out"
    lines(["export", "--format", "peft", "--run", str(run), "--out", str(out)], capsys)
    base = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    adapted = PeftModel.from_pretrained(base, out, autocast_adapter_dtype=False).eval()
    probe = Probe.load_probe(run / "probe.safetensors")
    size = probe.input_ids.shape[1]
    with torch.no_grad():
        logits = adapted(input_ids=probe.input_ids).logits[:, -size:].float()
    same = compare_logits(logits, probe)
    print(f"{case}: loss {found[0]:.4f} -> {found[-1]:.4f}; PEFT: {same}")
    assert same.relative < 1e-5

    held_out = evaluated(run, capsys)
    recorded = read_metrics(run / "metrics.jsonl")[-1].eval_loss
    assert held_out == {"eval_loss": pytest.approx(recorded, rel=1e-6), "step": 6}

    described = lines(["inspect", str(run)], capsys)
    assert f"virtual_tokens={CASES[case]['adapter']['num_virtual_tokens']}" in described
    assert "targets" not in described

    for argv in (["merge"], ["export", "--format", "mlx"]):
        message = lines([*argv, "--run", str(run), "--out", str(tmp_path / "m")], capsys, code=2)
        assert "virtual tokens change no weight, so there is nothing to merge" in message


def test_placed_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Pseudo tokens at any place: ours alone reads it, and says so."""
    assert train(World(), tree(tmp_path, "placed", train__steps=6)) == 0
    close_log()
    run = tmp_path / "run"
    found = losses(run)
    assert found[-1] < found[0]
    held_out = evaluated(run, capsys)
    recorded = read_metrics(run / "metrics.jsonl")[-1]
    assert held_out["eval_loss"] == pytest.approx(recorded.eval_loss, rel=1e-6)
    assert "P_TUNING_PLACED virtual_tokens=3" in lines(["inspect", str(run)], capsys)
    argv = ["export", "--format", "peft", "--run", str(run), "--out", str(tmp_path / "out")]
    assert "there is no PEFT form of it" in lines(argv, capsys, code=2)
    with pytest.raises(KeyError, match="P_TUNING_PLACED"):
        PeftConfig.from_pretrained(run / "adapter")


def test_resumed_at_other_ranks(tmp_path: Path) -> None:
    """Checkpoints hold the encoder, which goes on where it was."""

    def named(name: str, **changes: Any) -> dict[str, Any]:
        save = {"dir": str(tmp_path / name), "every": 0}
        return tree(tmp_path, "ptuning", save=save, train__steps=4, **changes)

    assert train(World(), named("whole")) == 0
    assert run_ranks(train, 2, named("cut"), 2) == [75, 75]
    assert train(World(), named("cut")) == 0
    close_log()
    expected, found = (torch.tensor(losses(tmp_path / name)) for name in ("whole", "cut"))
    assert len(found) == 4
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
