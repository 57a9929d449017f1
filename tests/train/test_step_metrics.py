"""A line of ``metrics.jsonl``; reading damaged files is tested in ``test_metrics``."""

import json
import math
from pathlib import Path

from dist_peft.train.step_metrics import StepMetrics, format_line, read_metrics

RECORD = StepMetrics(3, 1.5, 1e-4, 0.5, 1000, 250.0, 2**30, 2**20)


def test_a_line_leaves_out_absent_values_and_is_read_back(tmp_path: Path) -> None:
    line = format_line(RECORD)
    assert line.endswith("\n") and "eval_loss" not in json.loads(line)
    (tmp_path / "metrics.jsonl").write_text(line)
    assert read_metrics(tmp_path / "metrics.jsonl") == [RECORD]


def test_losses_of_tasks_that_are_not_finite_are_null() -> None:
    record = StepMetrics(
        1, math.nan, 0.0, 0.0, 1, 1.0, 0, 0, eval_by_task={"a": math.inf, "b": 2.0}
    )
    values = json.loads(format_line(record))
    assert values["loss"] is None and values["eval_by_task"] == {"a": None, "b": 2.0}
