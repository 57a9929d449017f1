import json
import math
from pathlib import Path
from typing import Any
from unittest import mock

from dist_peft.app.sweep import ranking
from dist_peft.app.sweep.ranking import format_ranking, rank_points, write_ranking
from dist_peft.app.sweep.sweep_file import SweepFile
from dist_peft.core.config.run import SweepPoint
from dist_peft.train.metrics import MetricsWriter
from dist_peft.train.step_metrics import StepMetrics


def save_sweep(directory: Path, points: list[tuple[str, int, float | None]]) -> SweepFile:
    """Points with a state, a number of steps and a last held-out loss."""
    names = [f"point-{number:03}" for number in range(len(points))]
    records = SweepFile(directory, {n: SweepPoint(seed=k) for k, n in enumerate(names)})
    for name, (state, steps, loss) in zip(names, points, strict=True):
        found: Any = state
        records.set_state(name, found, steps)
        with MetricsWriter(directory / name, 0) as metrics:
            for step in range(1, steps + 1):
                eval_loss = loss if step == steps else None
                metrics.write_step(
                    StepMetrics(step, 5.0 - step, 0.1, 1.0, 1, 1.0, 0, 0, eval_loss=eval_loss)
                )
        (directory / name / "config.yaml").write_text(f"train: {{seed: {name[-1]}}}\n")
    return records


def test_finished_ones_first_then_halved_then_failed(tmp_path: Path) -> None:
    points = [("failed", 3, 0.1), ("halved", 2, 0.2), ("finished", 4, 2.0), ("halved", 4, 3.0)]
    records = save_sweep(tmp_path, [*points, ("finished", 4, 1.0), ("finished", 4, math.nan)])
    order = [point.point[-1] for point in rank_points(tmp_path, records)]
    assert order == ["4", "2", "5", "3", "1", "0"]


def test_training_loss_where_nothing_is_held_out(tmp_path: Path) -> None:
    records = save_sweep(tmp_path, [("finished", 1, None), ("finished", 3, None)])
    lines = format_ranking(rank_points(tmp_path, records))
    assert lines[0].startswith("1. point-001: training loss 2.") and "(seed 1)" in lines[0]


def test_written_files(tmp_path: Path) -> None:
    records = save_sweep(tmp_path, [("finished", 2, 1.5), ("halved", 1, math.inf)])
    with mock.patch.object(ranking, "write_comparison") as write:
        write_ranking(tmp_path, records)
    found = json.loads((tmp_path / "ranking.json").read_text())["points"]
    assert [point["held_out_loss"] for point in found] == [1.5, None]
    assert write.call_args.args[1] == tmp_path / "report.html"
    assert "halved at step 1" in format_ranking(rank_points(tmp_path, records))[1]
