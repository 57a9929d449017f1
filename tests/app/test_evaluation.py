"""Losses are those that training measured; answers; other labels."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dist_peft.app import cli
from dist_peft.app.commands.train import train_from_config
from dist_peft.core.config.io import parse_config
from dist_peft.core.log import close_log
from dist_peft.core.world import World
from dist_peft.train.step_metrics import read_metrics
from tests.support.classification_runs import classifying_tree, save_classifier_base
from tests.support.tiny_runs import save_config, tiny_tree

pytestmark = pytest.mark.e2e


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    close_log()


def evaluate(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    capsys.readouterr()
    assert cli.main(["eval", *argv]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_losses_are_those_that_training_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = tiny_tree(tmp_path, base__quant={"kind": "nf4"}, adapter={"r": 4, "init": "pissa"})
    config = str(save_config(tmp_path, tree))
    assert train_from_config(parse_config(tree), World()) == 0
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    before, after = records[0].eval_loss_before, records[-1].eval_loss
    fresh = evaluate(capsys, "--config", config)
    assert fresh == {"eval_loss": pytest.approx(before, rel=1e-6), "step": 0}
    trained = evaluate(capsys, "--config", config, "--run", str(tmp_path / "run"))
    assert trained == {"eval_loss": pytest.approx(after, rel=1e-6), "step": 3}
    assert trained["eval_loss"] < fresh["eval_loss"]
    assert evaluate(capsys, "--run", str(tmp_path / "run")) == trained
    argv = ["eval", "--config", config, "--run", str(tmp_path / "run")]
    assert cli.main([*argv, "base.compute_dtype=bfloat16"]) == 2
    assert "another base" in capsys.readouterr().err


def test_bare_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = tiny_tree(tmp_path, adapter={"kind": "none"})
    found = evaluate(capsys, "--config", str(save_config(tmp_path, tree)))
    assert found["step"] == 0 and 3 < found["eval_loss"] < 6  # log 97 = 4.6


def test_other_labels_are_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In another order they would silently swap the classes."""
    tree = classifying_tree(tmp_path, save_classifier_base(tmp_path / "base", "bert"))
    assert train_from_config(parse_config(tree), World()) == 0
    close_log()
    (source,) = tree["data"]["train"]
    other = {**source, "labels": source["labels"][::-1]}
    data = {**tree["data"], "train": [other], "eval": [{**other, "labels": []}]}
    config, run = str(save_config(tmp_path, {**tree, "data": data})), str(tmp_path / "run")
    assert cli.main(["eval", "--config", config, "--run", run]) == 2
    message = capsys.readouterr().err
    assert f"for other labels than {', '.join(other['labels'])}" in message
    assert f"see base and data.train in {run}/config.yaml" in message
    assert cli.main(["train", "--config", config]) == 2
    assert "labels of data.train is" in capsys.readouterr().err
    close_log()


def test_questions_are_answered_by_likelihood(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it was trained on is found; where the key names another answer, that is wrong."""
    tree = tiny_tree(tmp_path, train__steps=25)
    config = str(save_config(tmp_path, tree))
    record = json.loads((tmp_path / "train.jsonl").read_text().splitlines()[0])
    known, other = " " + record["completion"], " w90 w3 w50 w21 w77"
    questions = [
        {"prompt": record["prompt"], "choices": [other, known], "answer": 1},
        {"prompt": record["prompt"], "choices": [known, other], "answer": 1},
    ]
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(q) + "\n" for q in questions))
    assert train_from_config(parse_config(tree), World()) == 0
    argv = ["--config", config, "--run", str(tmp_path / "run"), "--choices", str(file)]
    assert evaluate(capsys, *argv)["choices"][str(file)] == {
        "questions": 2,
        "accuracy": 0.5,
        "accuracy_norm": 0.5,
    }
    assert cli.main(["eval", "--config", config, "--choices", str(tmp_path / "none")]) == 2
    assert "cannot read questions" in capsys.readouterr().err
