"""A whole run in this process: files of the run directory, signals, numbers that are not finite."""

import itertools
import json
import os
import signal
import warnings
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import AutoPeftModelForCausalLM, PeftModel

from dist_peft.app import cli
from dist_peft.app.commands import train as train_app
from dist_peft.app.finished_run import load_finished_run
from dist_peft.app.step_exchange import HeldOutPass
from dist_peft.app.trainer import Trainer
from dist_peft.app.training_run import RESUMABLE
from dist_peft.app.verified_export import merge_finished_run
from dist_peft.core.config.io import load_config, parse_config
from dist_peft.core.log import close_log
from dist_peft.core.world import World
from dist_peft.data.cache import DocumentWriter
from dist_peft.data.documents import load_sequence_set
from dist_peft.export.verify import Probe
from dist_peft.model import load
from dist_peft.train.checkpoint_writer import _HashingWriter
from dist_peft.train.evaluate import EvalResult
from dist_peft.train.loop import TrainingStep
from dist_peft.train.objective import TokenObjective
from dist_peft.train.plots import draw_plot
from dist_peft.train.run_state import read_run_state
from dist_peft.train.step_metrics import read_metrics
from tests.support.tiny_runs import save_config, tiny_tree

pytestmark = pytest.mark.e2e


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1)]
    yield
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1)] == before
    close_log()


def train(tree: dict[str, Any]) -> int:
    return train_app.train_from_config(parse_config(tree), World())


def test_run_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dist_peft.train.report.draw_plot", draw_plot)
    tree = tiny_tree(tmp_path)
    assert train(tree) == 0
    run = tmp_path / "run"
    assert load_config(run / "config.yaml") == parse_config(tree)
    assert (run / "adapter" / "adapter_model.safetensors").is_file()
    about = json.loads((run / "adapter" / "dist_peft.json").read_text())
    assert about["base"] == str(tmp_path / "base") and about["quant"] is None
    assert [p.name for p in sorted((run / "checkpoints").iterdir())] == [
        "step-000002",
        "step-000003",
    ]
    records = read_metrics(run / "metrics.jsonl")
    assert [r.step for r in records] == [1, 2, 3]
    assert all(r.loss > 0 and r.grad_norm > 0 and r.mem_peak > 0 for r in records)
    assert records[0].eval_loss_before is not None and records[-1].eval_loss is not None
    assert records[-1].eval_loss < records[0].eval_loss_before
    assert list((run / "tensorboard").glob("events.*"))
    report = (run / "report.html").read_text()
    assert "Trained parameters" in report
    assert report.count("<svg ") == 7  # losses twice, norms of blocks
    assert "Longest document" in report and "transformers 5" in report
    assert "training" in (run / "log.txt").read_text()


def test_peft_loads_the_adapter_and_gives_the_trained_logits(tmp_path: Path) -> None:
    assert train(tiny_tree(tmp_path)) == 0
    probe = Probe.load_probe(tmp_path / "run" / "probe.safetensors")
    base = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = base(input_ids=probe.input_ids).logits
        adapted = PeftModel.from_pretrained(base, tmp_path / "run" / "adapter").eval()
        trained = adapted(input_ids=probe.input_ids).logits
    torch.testing.assert_close(before, probe.before, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(trained, probe.trained, rtol=1e-5, atol=1e-5)
    assert (probe.trained - probe.before).abs().max() > 1e-3


def test_signal_stops_after_the_step_and_the_same_command_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = tiny_tree(tmp_path, save__every=0)
    update = TrainingStep.update_parameters

    def signal_in_step_two(part: TrainingStep, step: int, *args: float) -> float:
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(part, step, *args)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingStep, "update_parameters", signal_in_step_two)
        assert train(tree) == RESUMABLE == 75
    run = tmp_path / "run"
    stopped = [r.loss for r in read_metrics(run / "metrics.jsonl")]
    assert len(stopped) == 2 and not (run / "adapter").exists()
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-000002"]
    assert train(tree) == 0
    resumed = [r.loss for r in read_metrics(run / "metrics.jsonl")]
    assert resumed[:2] == stopped and len(resumed) == 3
    assert "resumed" in (run / "log.txt").read_text()
    assert (run / "adapter").is_dir()

    tree = {**tree, "save": {"dir": str(tmp_path / "whole")}}
    assert train(tree) == 0
    assert [r.loss for r in read_metrics(tmp_path / "whole" / "metrics.jsonl")] == resumed


def send_once(call: Callable[..., Any], number: signal.Signals, at: int = 1) -> Callable[..., Any]:
    """Return ``call``, before whose ``at``-th call this process gets a signal."""
    calls = itertools.count(1)

    def wrapper(*args: Any, **options: Any) -> Any:
        if next(calls) == at:
            os.kill(os.getpid(), number)
        return call(*args, **options)

    return wrapper


EVALUATE = (TokenObjective, "compute_row_statistics")
PHASES = {
    "tokenizing": (DocumentWriter, "append_documents", signal.SIGUSR1, 1, []),
    "load": (load, "_read_local_rows", signal.SIGUSR2, 3, []),
    "evaluation before": (*EVALUATE, signal.SIGHUP, 1, []),
    "evaluation after step 1": (*EVALUATE, signal.SIGTERM, 5, [1]),
    "checkpoint of step 2": (_HashingWriter, "write_data", signal.SIGUSR1, 1, [2, 3]),
    # that of step 3, which the signal before has left out, that of step 4, and this one
    "evaluation after the end": (*EVALUATE, signal.SIGINT, 8, [4, 5]),
}
"""Where a signal comes, at which call, and the steps of the checkpoints that are there then."""


@pytest.mark.e2e
def test_signal_in_each_phase_gives_75_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One run, stopped in each phase, has the losses of a run that was never stopped."""
    tree = tiny_tree(tmp_path, train__eval_every=1, train__steps=5, save__asynchronous=False)
    run, cache = tmp_path / "run", tmp_path / "cache"
    for phase, (owner, name, number, at, steps) in PHASES.items():
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, send_once(getattr(owner, name), number, at))
            assert train(tree) == RESUMABLE, phase
        saved = sorted(p.name for p in run.glob("checkpoints/step-*"))
        assert saved == [f"step-{step:06d}" for step in steps], phase
        assert not list(cache.rglob("*.tmp-*")) and not list(cache.rglob("*.lease"))
        if run.exists():
            state = read_run_state(run)
            assert state is not None and state.state == "stopped", phase
    assert train(tree) == 0
    assert train({**tree, "save": {"dir": str(tmp_path / "whole"), "every": 0}}) == 0
    assert list_curve(run) == list_curve(tmp_path / "whole")


def list_curve(run: Path) -> list[tuple[int, float, float | None, float | None]]:
    records = read_metrics(run / "metrics.jsonl")
    return [(r.step, r.loss, r.eval_loss, r.eval_loss_before) for r in records]


def test_ctrl_c_stops_after_the_step_and_a_second_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    tree = tiny_tree(tmp_path, save__every=0)
    update = TrainingStep.update_parameters
    times = {1: 1, 2: 2}

    def interrupted(part: TrainingStep, step: int, *args: float) -> float:
        for _ in range(times.get(step, 0)):
            os.kill(os.getpid(), signal.SIGINT)
        return update(part, step, *args)

    monkeypatch.setattr(TrainingStep, "update_parameters", interrupted)
    assert train(tree) == RESUMABLE
    assert "stopping at the next safe point; Ctrl-C again stops at once" in capfd.readouterr().err
    assert (tmp_path / "run" / "checkpoints" / "step-000002" / "run.json").is_file()
    with pytest.raises(KeyboardInterrupt):
        train(tree)


def test_consumer_formats_conversations_as_training_did(tmp_path: Path) -> None:
    """The template of this project goes along with the adapter and into the merged model."""
    tree = tiny_tree(tmp_path, data__eval=[], data__seq_len=64)
    turns = [{"role": "user", "content": "w5"}, {"role": "assistant", "content": "w6"}]
    (tmp_path / "train.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 4)
    assert train(tree) == 0
    run = tmp_path / "run"
    merge_finished_run(run, tmp_path / "merged")
    assert not tf.AutoTokenizer.from_pretrained(tmp_path / "base").chat_template
    for directory in (run / "adapter", tmp_path / "merged"):
        tokenizer = tf.AutoTokenizer.from_pretrained(directory)
        text = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
        assert text.endswith("<|user|>\nw5\n<|assistant|>\n")
    config = load_config(run / "config.yaml")
    rows = load_sequence_set(config.data, config.data.train, tokenizer, name="train")
    trained = tokenizer.decode(rows.get_sequence(0)[0])
    assert trained.startswith(tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)))


def test_peft_finds_a_base_that_was_given_relative_to_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = tiny_tree(tmp_path, base__path="base")
    monkeypatch.chdir(tmp_path)
    assert train(tree) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoPeftModelForCausalLM.from_pretrained("../run/adapter", dtype=torch.float32)
        probe = Probe.load_probe(tmp_path / "run" / "probe.safetensors")
        logits = model.eval()(input_ids=probe.input_ids).logits
    torch.testing.assert_close(logits, probe.trained, rtol=1e-5, atol=1e-5)


def test_epochs_and_default_steps(tmp_path: Path) -> None:
    tree = tiny_tree(tmp_path, data__eval=[])
    for wanted, steps in (({"epochs": 0.5}, 2), ({}, 4)):
        tree["train"] = {**tree["train"], "steps": None, "epochs": None, **wanted}
        tree["save"] = {"dir": str(tmp_path / f"run{steps}")}
        assert train(tree) == 0
        assert len(read_metrics(tmp_path / f"run{steps}" / "metrics.jsonl")) == steps


def test_early_stop_finishes_the_run_and_is_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = (5.0, 4.0, 3.0, 3.5, 3.2, 1.0, 0.5)

    def evaluate(self: Trainer, step: int) -> Generator[HeldOutPass, Any, EvalResult]:
        yield HeldOutPass(step)
        return EvalResult(losses[step], {})

    monkeypatch.setattr(Trainer, "_evaluate_held_out", evaluate)
    tree = tiny_tree(tmp_path)
    tree["train"] |= {"steps": 6, "eval_every": 1, "early_stop": 2}
    tree["save"] |= {"every": 0, "keep": 1, "keep_best": True}
    run = tmp_path / "run"
    assert train(tree) == 0
    records = read_metrics(run / "metrics.jsonl")
    assert [record.eval_loss for record in records] == [4.0, 3.0, 3.5, 3.2]
    best = json.loads((run / "checkpoints" / "best.json").read_text())
    assert best == {"step": 2, "metric": "loss", "value": 3.0}
    kept = sorted(path.name for path in (run / "checkpoints").glob("step-*"))
    assert kept == ["step-000002", "step-000004"]
    state = json.loads((run / "run_state.json").read_text())
    assert (state["state"], state["step"]) == ("finished", 4)
    assert "train.early_stop: 2 evaluations" in (run / "log.txt").read_text()
    before = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    assert train(tree) == 0
    assert read_metrics(run / "metrics.jsonl") == records
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == before


def test_secret_of_the_environment_is_in_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Nor on the terminal; the same command resumes, and the finished run can be read."""
    tree = tiny_tree(tmp_path)
    secret = "w51 w52 w53"  # known words: it is trained on
    tree["data"]["train"] = [
        {"path": str(tmp_path / "train.jsonl"), "template": "${oc.env:MY_TOKEN} {prompt}"}
    ]
    monkeypatch.setenv("MY_TOKEN", secret)
    file = save_config(tmp_path, tree)
    argv = ["train", "--config", str(file)]
    assert cli.main(argv) == 0
    assert cli.main([*argv, "train.steps=4"]) == 0
    again = ["train", "--config", str(tmp_path / "run" / "config.yaml"), "train.steps=5"]
    assert cli.main(again) == 0
    run = tmp_path / "run"
    files = [path for path in run.rglob("*") if path.is_file()]
    assert {"config.yaml", "report.html", "log.txt", "run.json"} <= {path.name for path in files}
    assert not [path for path in files if secret.encode() in path.read_bytes()]
    assert "template: ${oc.env:MY_TOKEN} {prompt}" in (run / "config.yaml").read_text()
    assert "${oc.env:MY_TOKEN}" in (run / "report.html").read_text()
    monkeypatch.setenv("MY_TOKEN", "w60 w61 w62")
    assert cli.main([*argv, "train.steps=6"]) == 2  # other rows
    monkeypatch.delenv("MY_TOKEN")
    assert load_finished_run(run).data.train[0].template == "${oc.env:MY_TOKEN} {prompt}"
    shown = capfd.readouterr()
    assert secret not in shown.out + shown.err
