"""``train.tasks: separate``: each task is the run of its source alone, whatever the engine."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from dist_peft.app import cli
from dist_peft.app.resolved_config import split_task_configs
from dist_peft.app.tasks import list_task_runs, refuse_separate_tasks
from dist_peft.core.config.io import dump_config, load_config, parse_config
from dist_peft.core.errors import UserError
from dist_peft.core.log import close_log
from dist_peft.core.world import World
from dist_peft.train import report
from dist_peft.train.step_metrics import METRICS_FILE, StepMetrics, read_metrics
from tests.support.classification_runs import (
    classifying_tree,
    save_classifier_base,
    save_pairs,
    source,
)
from tests.support.dist import run_ranks
from tests.support.story_runs import losses, train
from tests.support.task_runs import ENGINES, list_tree

pytestmark = pytest.mark.e2e

NAMES = ("long", "short", "other")


def not_drawing() -> Any:
    """Without the reports' images, which take seconds and are tested elsewhere."""
    return mock.patch.object(report, "draw_plot", return_value="")


@pytest.fixture(autouse=True)
def _quick() -> Iterator[None]:
    with not_drawing():
        yield
    close_log()


def alone(run: Path, directory: Path, engine: dict[str, Any]) -> dict[str, Any]:
    """The configuration that a task's directory holds, elsewhere."""
    tree: dict[str, Any] = load_config(run / "config.yaml").model_dump(mode="json")
    return {**tree, "save": {**tree["save"], "dir": str(directory)}, "engine": engine}


def numbers(run: Path) -> list[StepMetrics]:
    """Metrics without what time and the machine make of them, and DeepSpeed's stage 3, which
    remembers what it gathered."""
    nothing = {"tokens_per_s": 0.0, "mem_peak": 0, "seconds": 0.0, "bytes_gathered": 0}
    nothing |= {"straggler_share": None, "slowest_rank": None}
    nothing |= dict.fromkeys(("rank_rate_min", "rank_rate_median", "rank_rate_max"))
    return [StepMetrics(**{**vars(r), **nothing}) for r in read_metrics(run / METRICS_FILE)]


def assert_same_run(run: Path, other: Path) -> None:
    assert numbers(run) == numbers(other)
    for name in ("adapter/adapter_model.safetensors", "probe.safetensors"):
        assert (run / name).read_bytes() == (other / name).read_bytes(), name


def all_trained(world: World, trees: list[dict[str, Any]]) -> list[int]:
    """Several runs in one set of processes."""
    with not_drawing():
        return [train(world, tree) for tree in trees]


def test_task_is_the_run_of_its_source_alone(tmp_path: Path) -> None:
    assert train(World(), list_tree(tmp_path)) == 0
    close_log()
    run = tmp_path / "run"
    assert list(list_task_runs(run)) == list(NAMES)
    for name in NAMES[1:]:
        task = run / "tasks" / name
        assert train(World(), alone(task, tmp_path / name, {})) == 0
        close_log()
        assert_same_run(task, tmp_path / name)
        assert (task / "report.html").is_file() and not (task / "log.txt").exists()
    found = json.loads((run / "tasks.json").read_text())["tasks"]
    records = {name: read_metrics(run / "tasks" / name / METRICS_FILE) for name in NAMES}
    assert found == {
        name: {
            "run": f"tasks/{name}",
            "steps": 3,
            "loss": r[-1].loss,
            **(
                {"eval_loss_before": r[0].eval_loss_before, "eval_loss": r[-1].eval_loss}
                if name != "other"
                else {}
            ),
        }
        for name, r in records.items()
    }
    assert r"An adapter for each of 3 tasks" in (run / "report.html").read_text()
    assert "task short, 2 of 3" in (run / "log.txt").read_text()
    assert load_config(run / "tasks" / "other" / "config.yaml").data.eval == []


@pytest.mark.dist
def test_task_is_the_run_of_its_source_alone_on_two_ranks(tmp_path: Path) -> None:
    """Losses, adapter bytes and all: nothing of the task before is left in any engine."""
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    trees: list[dict[str, Any]] = []
    whole = list_tree(tmp_path, 2, train__steps=2)
    engines = [ENGINES[0], ENGINES[-1]]  # the others: tests/engine/test_zero.py
    for number, engine in enumerate(engines):
        save = {"dir": str(tmp_path / f"run{number}"), "every": 0}
        trees.append({**whole, "engine": engine, "save": save})
        task = split_task_configs(parse_config(trees[-1]))["short"].model_dump(mode="json")
        save = {**task["save"], "dir": str(tmp_path / f"alone{number}")}
        trees.append({**task, "save": save, "engine": engine})
    assert run_ranks(all_trained, 2, trees, timeout=400) == [[0] * len(trees)] * 2
    for number, engine in enumerate(engines):
        assert_same_run(tmp_path / f"run{number}" / "tasks" / "short", tmp_path / f"alone{number}")
        found = losses(tmp_path / f"run{number}" / "tasks" / "short")
        assert found == pytest.approx(losses(tmp_path / "run0" / "tasks" / "short"), rel=1e-6)
        print(engine, found)


def test_stopped_in_the_second_task_it_goes_on_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a start that is computed from the base (PiSSA), and read again where one is kept."""
    adapter = {"r": 3, "alpha": 8, "dropout": 0.2, "init": "pissa"}
    tree = list_tree(tmp_path, 2, adapter=adapter)
    assert train(World(), {**tree, "save": {"dir": str(tmp_path / "whole")}}) == 0
    assert train(World(), tree, 5) == 75
    close_log()
    run = tmp_path / "run"
    assert losses(run / "tasks" / "short") == losses(tmp_path / "whole" / "tasks" / "short")[:2]
    assert list(json.loads((run / "tasks.json").read_text())["tasks"]) == ["long"]
    before = (run / "tasks" / "long" / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    capsys.readouterr()
    assert train(World(), tree) == 0
    text = capsys.readouterr().err
    assert "task long is finished" in text and "at step 2" in text
    after = (run / "tasks" / "long" / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    assert after == before
    for name in NAMES[:2]:
        assert_same_run(run / "tasks" / name, tmp_path / "whole" / "tasks" / name)
    more = {**tree, "train": {**tree["train"], "steps": 4}}
    assert train(World(), more) == 0  # more steps: each goes on
    assert [len(losses(run / "tasks" / name)) for name in NAMES[:2]] == [4, 4]
    other = {**tree, "adapter": {**adapter, "dropout": 0.0}}
    with pytest.raises(UserError, match=r"tasks/long/.*adapter\.dropout is 0\.0, there 0\.2"):
        train(World(), other)


def test_every_verb_reads_a_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And says of the whole run that it is several."""
    assert train(World(), list_tree(tmp_path, 2, train__steps=1)) == 0
    run = tmp_path / "run"
    task = run / "tasks" / "long"
    close_log()
    assert cli.main(["merge", "--run", str(task), "--out", str(tmp_path / "merged")]) == 0
    out = ["--format", "peft", "--out", str(tmp_path / "peft")]
    assert cli.main(["export", "--run", str(task), *out]) == 0
    capsys.readouterr()
    assert cli.main(["eval", "--config", str(task / "config.yaml"), "--run", str(task)]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["eval_loss"] == pytest.approx(numbers(task)[-1].eval_loss, rel=1e-6)
    assert cli.main(["inspect", str(run)]) == 0
    assert "task long" in capsys.readouterr().out
    for verb in (["merge"], ["export", "--format", "gguf"]):
        assert cli.main([*verb, "--run", str(run), "--out", str(tmp_path / "no")]) == 2
        assert f"takes one at a time: --run {task}" in capsys.readouterr().err
    close_log()


def test_classifiers_have_a_head_for_each_task(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of their own labels, as a run of the task alone; eval tells each one's own scores."""
    base = save_classifier_base(tmp_path / "base", "bert")
    others = ["0", "1"]
    pairs = source(save_pairs(tmp_path / "a.tsv", 9), name="rte")
    named = {"name": "mrpc", "labels": others}
    trained = [pairs, source(save_pairs(tmp_path / "b.tsv", 8, others), **named)]
    held_out = [source(save_pairs(tmp_path / "c.tsv", 5, others), **named)]
    tree = classifying_tree(tmp_path, base, data__train=trained, data__eval=held_out)
    tree["train"]["tasks"] = "separate"
    assert train(World(), tree) == 0
    close_log()
    run = tmp_path / "run"
    for name, labels in (("rte", pairs["labels"]), ("mrpc", others)):
        task = run / "tasks" / name
        assert train(World(), alone(task, tmp_path / name, {})) == 0
        close_log()
        assert_same_run(task, tmp_path / name)
        about = json.loads((task / "adapter" / "dist_peft.json").read_text())
        assert about["labels"] == labels
    capsys.readouterr()
    assert cli.main(["eval", "--config", str(run / "config.yaml"), "--run", str(run)]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    last = read_metrics(run / "tasks" / "mrpc" / METRICS_FILE)[-1]
    assert found["adapters"]["rte"] == {"step": 3}
    assert found["adapters"]["mrpc"] == {
        "eval_loss": pytest.approx(last.eval_loss, rel=1e-6),
        "eval_accuracy": last.eval_accuracy,
        "eval_macro_f1": last.eval_macro_f1,
        "eval_matthews": last.eval_matthews,
        "step": 3,
    }
    assert list(found["own"]) == ["mrpc"]
    close_log()
    tree["data"]["train"][1]["labels"] = ["0", "1", "2"]
    tree["data"]["eval"] = []
    with pytest.raises(UserError, match=r"numbers of labels \(rte 2, mrpc 3\)"):
        train(World(), tree)


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__train": ["a.jsonl"]}, "data.train has one source"),
        ({"data__train": ["x/a.jsonl", "y/a.jsonl"]}, r"two sources .* called a; set their name"),
        ({"data__train": [{"path": "a.jsonl", "name": "a/b"}, "b.jsonl"]}, "'a/b', cannot be a"),
        ({"data__train": [{"path": "a.jsonl", "name": ".."}, "b.jsonl"]}, r"'\.\.', cannot be a"),
        ({"data__mixing": "sizes"}, "data.mixing is sizes"),
        ({"data__eval": ["dev.jsonl"]}, r"data\.eval\[0\] is of task dev.*a, b"),
        ({"adapter": {"kind": "full"}}, "kind full trains weights of the base"),
        ({"adapter": {"kind": "partial", "last_blocks": 1}}, "kind partial trains weights"),
        ({"resume": "runs/x/checkpoints/step-000001"}, "resume names a checkpoint"),
    ],
)
def test_refused(changes: dict[str, Any], message: str) -> None:
    tree: dict[str, Any] = {
        "base": {"path": "base"},
        "data": {"train": ["a.jsonl", "b.jsonl"]},
        "train": {"tasks": "separate"},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        tree[section] = {**tree.get(section, {}), name: value} if name else value
    with pytest.raises(UserError, match=message):
        train(World(), tree)


def test_damaged_tasks_file_is_named(tmp_path: Path) -> None:
    tree = list_tree(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tasks.json").write_text("{}")
    with pytest.raises(UserError, match=r"tasks\.json is damaged.*remove it"):
        train(World(), tree)
    close_log()


def test_ordinary_run_has_no_tasks(tmp_path: Path) -> None:
    assert list_task_runs(tmp_path) == {}
    (tmp_path / "tasks").mkdir()
    (tmp_path / "config.yaml").write_text(dump_config(parse_config(list_tree(tmp_path))))
    assert list_task_runs(tmp_path) == {}
    refuse_separate_tasks(tmp_path)
