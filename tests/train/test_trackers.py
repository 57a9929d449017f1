"""Trackers: the real libraries, offline; a failure of one never ends a run."""

import json
import logging
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from dist_peft.core.errors import UserError
from dist_peft.train import trackers
from dist_peft.train.metrics import MetricsWriter
from dist_peft.train.step_metrics import StepMetrics, read_metrics
from dist_peft.train.trackers import check_trackers_installed, list_tracker_sinks

CONFIG = {"train": {"lr": 1e-4, "steps": 3}, "base": {"path": "b" * 600}}


def make_record(step: int, **more: Any) -> StepMetrics:
    return StepMetrics(step, 1.5 / step, 1e-4, 0.5, 1000, 250.0, 2**30, 2**20, **more)


RECORDS = [make_record(1, eval_loss_before=2.0), make_record(2), make_record(3, eval_loss=1.0)]


def write_in_two_attempts(run_dir: Path, tracker: str) -> str:
    """Two steps, and a third by a resumed run; return the tracker's id of the run."""
    for first, records in ((0, RECORDS[:2]), (2, RECORDS[2:])):
        sinks = list_tracker_sinks([tracker], run_dir, CONFIG)
        with MetricsWriter(run_dir, 0, first, sinks) as writer:
            for record in records:
                writer.write_step(record)
    ids = json.loads((run_dir / "trackers.json").read_text())
    assert set(ids) == {tracker}
    return str(ids[tracker])


@pytest.mark.e2e
def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path / 'server'}")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    number = write_in_two_attempts(tmp_path / "my-run", "mlflow")
    client = mlflow.MlflowClient()
    run = client.get_run(number)
    assert (run.info.run_name, run.info.status) == ("my-run", "FINISHED")
    assert run.data.params["train.lr"] == "0.0001" and len(run.data.params["base.path"]) == 500
    for name, expected in {
        "train/loss": [(1, 1.5), (2, 0.75), (3, 0.5)],
        "eval/loss": [(0, 2.0), (3, 1.0)],
        "memory/peak_GiB": [(1, 1.0), (2, 1.0), (3, 1.0)],
    }.items():
        history = client.get_metric_history(number, name)
        assert sorted((m.step, m.value) for m in history) == expected


@pytest.mark.e2e
def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run_dir = tmp_path / "my-run"
    number = write_in_two_attempts(run_dir, "wandb")
    end, logged = time.monotonic() + 30, []
    while len(logged) < 4 and time.monotonic() < end:  # its process writes on after finish()
        time.sleep(0.05)
        files = sorted((run_dir / "wandb").glob("offline-run-*/*.wandb"))
        assert all(file.stem == f"run-{number}" for file in files)
        logged = [row for file in files for row in read_wandb_history(file)]
    losses = [(row["_step"], row["train/loss"]) for row in logged if "train/loss" in row]
    assert losses == [(1, 1.5), (2, 0.75), (3, 0.5)]
    evaluated = [(row["_step"], row["eval/loss"]) for row in logged if "eval/loss" in row]
    assert evaluated == [(0, 2.0), (3, 1.0)]


@pytest.mark.e2e
def test_points_of_a_sweep_are_runs_at_the_same_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    pytest.importorskip("wandb", reason="wandb is not installed")
    for name in ("WANDB_MODE", "WANDB_SILENT"):
        monkeypatch.setenv(name, "offline" if name == "WANDB_MODE" else "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path / 'server'}")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/sweep.json").touch()
    points = [tmp_path / "mine" / name for name in ("point-000", "point-001")]
    with ExitStack() as stack:
        writers = [
            stack.enter_context(
                MetricsWriter(p, 0, 0, list_tracker_sinks(["mlflow", "wandb"], p, CONFIG))
            )
            for p in points
        ]
        for step in (1, 2):
            for number, writer in enumerate(writers):
                writer.write_step(make_record(step + 10 * number))
    client = mlflow.MlflowClient()
    for number, point in enumerate(points):
        ids = json.loads((point / "trackers.json").read_text())
        run = client.get_run(ids["mlflow"])
        assert (run.info.run_name, run.info.status) == (f"mine/{point.name}", "FINISHED")
        history = client.get_metric_history(ids["mlflow"], "train/loss")
        assert [m.step for m in history] == [1 + 10 * number, 2 + 10 * number]
        end, steps = time.monotonic() + 30, list[int]()
        while len(steps) < 2 and time.monotonic() < end:
            time.sleep(0.05)
            files = (point / "wandb").glob("offline-run-*/*.wandb")
            rows = [row for file in files for row in read_wandb_history(file)]
            steps = [row["_step"] for row in rows if "train/loss" in row]
        assert steps == [1 + 10 * number, 2 + 10 * number]


def read_wandb_history(file: Path) -> list[dict[str, Any]]:
    """The history of an offline run: messages in LevelDB's log format, after a header."""
    from wandb.proto import wandb_internal_pb2

    data, rows, message, place = file.read_bytes(), [], b"", 7
    while place + 7 <= len(data):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        size, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        message += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record.FromString(message)
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                names = [item.key or ".".join(item.nested_key) for item in items]
                rows.append(
                    dict(zip(names, (json.loads(i.value_json) for i in items), strict=True))
                )
            message = b""
    return rows


@pytest.mark.e2e
def test_trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio", reason="trackio is not installed")
    assert write_in_two_attempts(tmp_path / "my-run", "trackio") == "my-run"
    assert list((tmp_path / "trackio").glob("*.db"))


class _Broken:
    """A tracker whose server goes away after a step."""

    run_id = "1"

    def __init__(self, *_: object) -> None:
        self.steps: list[int] = []
        made.append(self)

    def log_scalars(self, scalars: Mapping[str, float], step: int) -> None:
        if self.steps:
            raise ConnectionError("the server is gone")
        self.steps.append(step)

    def finish(self) -> None:
        raise AssertionError("it was given up")


made: list[_Broken] = []


def test_failure_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("no key")

    monkeypatch.setattr(trackers, "TRACKERS", {"broken": _Broken, "refusing": refuse})
    sinks = list_tracker_sinks(["broken", "refusing"], tmp_path, CONFIG)
    with (
        caplog.at_level(logging.WARNING, "dist_peft"),
        MetricsWriter(tmp_path, 0, 0, sinks) as writer,
    ):
        for record in RECORDS:
            writer.write_step(record)
    warnings = [r.getMessage() for r in caplog.records if "gets no more metrics" in r.getMessage()]
    assert [w.split()[0] for w in warnings] == ["refusing", "broken"]
    assert "PermissionError: no key" in warnings[0] and "the server is gone" in warnings[1]
    assert made.pop().steps == [0]  # the loss before training
    assert read_metrics(tmp_path / "metrics.jsonl") == RECORDS
    assert json.loads((tmp_path / "trackers.json").read_text()) == {"broken": "1"}


def test_missing_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"save\.track: wandb is not installed; pip install wandb"):
        check_trackers_installed(["wandb"])
    check_trackers_installed([])
