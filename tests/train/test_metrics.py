"""metrics.jsonl: each step once, whatever interrupted the run before."""

import io
import json
import math
import resource
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dist_peft.core.errors import UserError
from dist_peft.train.metric_sinks import JsonLinesSink
from dist_peft.train.metrics import MetricsWriter, format_byte_count, read_peak_memory_bytes
from dist_peft.train.step_metrics import StepMetrics, read_metrics


def record(step: int, loss: float = 2.0) -> StepMetrics:
    return StepMetrics(
        step=step,
        loss=loss,
        lr=1e-4,
        grad_norm=0.5,
        tokens=1000,
        tokens_per_s=250.0,
        mem_peak=2**30,
        bytes_gathered=2**20,
    )


def test_one_line_a_step_with_the_agreed_keys(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "new", rank=0) as metrics:
        metrics.write_step(record(1))
        metrics.write_step(replace(record(2), eval_loss=1.5, epoch=0.5, samples=32, seconds=4.0))
    first, second = (json.loads(x) for x in metrics.path.read_text().splitlines())
    keys = ["step", "loss", "lr", "grad_norm", "tokens", "tokens_per_s", "mem_peak"]
    assert list(first) == [*keys, "bytes_gathered"]
    assert first["tokens"] == 1000
    assert second.keys() - first.keys() == {"eval_loss", "epoch", "samples", "seconds"}
    assert read_metrics(metrics.path)[0] == record(1)


def test_scores_of_classes(tmp_path: Path) -> None:
    """Beside the losses, in the file and in TensorBoard; before the first step under step 0."""
    scored = replace(
        record(1),
        eval_accuracy_before=0.5,
        eval_accuracy=0.75,
        eval_macro_f1=0.7,
        eval_matthews_before=-0.25,
        eval_matthews=0.25,
        eval_f1_by_task={"mrpc": 0.6},
        eval_accuracy_by_task={"rte": 0.8, "mrpc": 0.7},
    )
    with MetricsWriter(tmp_path, rank=0) as metrics:
        metrics.write_step(scored)
    assert read_metrics(metrics.path) == [scored]
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    points = [(e.step, e.value) for e in board.Scalars("eval/accuracy")]
    assert points == [(0, 0.5), (1, 0.75)]
    assert [e.value for e in board.Scalars("eval/matthews")] == [-0.25, 0.25]
    assert board.Scalars("eval/f1/mrpc")[0].value == pytest.approx(0.6)
    assert board.Scalars("eval/accuracy/rte")[0].value == pytest.approx(0.8)


def test_a_line_is_in_the_file_at_once(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, rank=0) as metrics:
        metrics.write_step(record(1))
        assert read_metrics(metrics.path) == [record(1)]


def test_other_ranks_touch_nothing(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "run", rank=1) as metrics:
        metrics.write_step(record(1))
    assert not (tmp_path / "run").exists()


def test_resume_drops_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, rank=0) as metrics:
        for step in range(1, 6):
            metrics.write_step(record(step, loss=9.0))
    with metrics.path.open("a") as file:
        file.write('{"step": 6, "lo')  # killed while writing
    with MetricsWriter(tmp_path, rank=0, first_step=3) as metrics:
        metrics.write_step(record(4, loss=1.0))
        metrics.write_step(record(5, loss=1.0))
    lines = [json.loads(x) for x in metrics.path.read_text().splitlines()]
    assert [(x["step"], x["loss"]) for x in lines] == [
        (1, 9.0),
        (2, 9.0),
        (3, 9.0),
        (4, 1.0),
        (5, 1.0),
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]


def test_a_clean_file_is_not_rewritten(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, rank=0) as metrics:
        metrics.write_step(record(1))
    inode = metrics.path.stat().st_ino
    MetricsWriter(tmp_path, rank=0, first_step=1).close()
    assert metrics.path.stat().st_ino == inode


def test_a_run_from_the_start_clears_an_older_one(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, rank=0) as metrics:
        metrics.write_step(record(1))
    MetricsWriter(tmp_path, rank=0).close()
    assert metrics.path.read_text() == ""


@given(st.integers(0, 4), st.integers(1, 200))
def test_reading_survives_a_cut_anywhere(
    tmp_path_factory: pytest.TempPathFactory, whole: int, cut: int
) -> None:
    line = json.dumps(
        {
            "step": 0,
            "loss": 1.0,
            "lr": 1e-4,
            "grad_norm": 0.5,
            "tokens": 10,
            "tokens_per_s": 5.0,
            "mem_peak": 1,
            "bytes_gathered": 0,
        }
    )
    lines = [line.replace('"step": 0', f'"step": {i}') for i in range(1, whole + 1)]
    path = tmp_path_factory.mktemp("cut") / "metrics.jsonl"
    path.write_text("".join(x + "\n" for x in lines) + line[: min(cut, len(line) - 1)])
    assert [r.step for r in read_metrics(path)] == list(range(1, whole + 1))


def test_reading_keeps_the_last_of_a_repeated_step_and_ignores_new_keys(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    values = {k: v for k, v in vars(record(2)).items() if v is not None}
    lines = [values, values | {"step": 1, "from_the_future": "x"}, values | {"loss": 0.25}]
    path.write_text("\n\n".join(json.dumps(x) for x in lines) + "\n")
    assert read_metrics(path) == [record(1), record(2, loss=0.25)]


@pytest.mark.parametrize(
    ("line", "reason"),
    [("not json", "Expecting value"), ("[1]", "not a JSON object"), ('{"step": "1"}', "step")],
)
def test_damage_in_the_middle_is_named(tmp_path: Path, line: str, reason: str) -> None:
    path = tmp_path / "metrics.jsonl"
    good = json.dumps({k: v for k, v in vars(record(1)).items() if v is not None})
    path.write_text(f"{good}\n{line}\n{good}\n")
    with pytest.raises(UserError, match=rf"metrics\.jsonl, line 2 .*{reason}.*remove the line"):
        read_metrics(path)


def test_no_file_no_records(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_not_finite_numbers_stay_valid_json(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, rank=0) as metrics:
        metrics.write_step(replace(record(1), grad_norm=math.inf))
        metrics.write_step(record(2))
    assert '"grad_norm": null' in metrics.path.read_text()
    assert math.isnan(read_metrics(metrics.path)[0].grad_norm)


def scalars(run_dir: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return [(e.step, round(e.value, 4)) for e in events.Scalars(tag)]


def test_tensorboard_holds_each_step_once_too(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, rank=0) as metrics:
        metrics.write_step(replace(record(1, loss=9.0), eval_loss_before=3.0))
        metrics.write_step(record(2, loss=9.0))
        metrics.write_step(record(3, loss=9.0))
    time.sleep(1.1)  # TensorBoard orders the files of attempts by their second
    with MetricsWriter(tmp_path, rank=0, first_step=1) as metrics:
        metrics.write_step(replace(record(2, loss=1.0), eval_loss=2.5))
    assert scalars(tmp_path, "train/loss") == [(1, 9.0), (2, 1.0)]
    assert scalars(tmp_path, "eval/loss") == [(0, 3.0), (2, 2.5)]
    assert scalars(tmp_path, "memory/peak_GiB") == [(1, 1.0), (2, 1.0)]


def test_unwritable_directory_is_the_users(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("in the way")
    with pytest.raises(UserError, match=r"cannot write .*run.*save\.dir"):
        MetricsWriter(tmp_path / "run", rank=0)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_is_the_users(tmp_path: Path) -> None:
    metrics = MetricsWriter(tmp_path, rank=0)
    sink = metrics._sinks[0]
    assert isinstance(sink, JsonLinesSink)
    sink._file.close()
    sink._file = io.TextIOWrapper(io.BufferedWriter(io.FileIO("/dev/full", "w")))
    with pytest.raises(UserError, match="No space left on device; free space"):
        metrics.write_step(record(1))
    metrics.close()  # the buffered line is given up, so this does not fail again


def test_peak_memory_is_the_resident_set_in_bytes() -> None:
    peak = read_peak_memory_bytes(torch.device("cpu"))
    assert 50 * 2**20 < peak < 2**40  # torch alone takes more than 50 MiB
    assert read_peak_memory_bytes(torch.device("cpu")) >= peak


@pytest.mark.parametrize(("platform", "factor"), [("linux", 1024), ("darwin", 1)])
def test_peak_memory_knows_the_platforms_unit(
    platform: str, factor: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=3))
    assert read_peak_memory_bytes(torch.device("cpu")) == 3 * factor


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "0.98 KiB"),
        (1536, "1.50 KiB"),
        (15 * 2**20, "15.0 MiB"),
        (512 * 2**20, "512 MiB"),
        (24 * 2**30, "24.0 GiB"),
        (2**60, "1024 PiB"),
    ],
)
def test_format_bytes(count: int, text: str) -> None:
    assert format_byte_count(count) == text
