"""The best evaluation, and when training stops for want of a better one."""

import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from dist_peft.core.world import World
from dist_peft.train.classification_metrics import ClassScores
from dist_peft.train.eval_history import EvaluationHistory
from dist_peft.train.evaluate import EvalResult
from dist_peft.train.step_metrics import METRICS_FILE, StepMetrics, format_line


def make_record(step: int, value: float | None, metric: str = "loss") -> StepMetrics:
    values: dict[str, Any] = {
        f.name: 1 for f in fields(StepMetrics) if not f.name.startswith(("eval", "sample_texts"))
    }
    return StepMetrics(**{**values, "step": step, f"eval_{metric}": value})


def test_patience_counts_evaluations_without_a_lower_loss() -> None:
    history = EvaluationHistory(patience=2)
    losses = (3.0, 2.0, 2.0, 1.9, math.nan, 2.5)
    assert [history.add_value(loss) for loss in losses] == [True, True, False, True, False, False]
    assert history.best == ("loss", 1.9) and history.should_stop
    assert history.add_value(1.8) and not history.should_stop


def test_without_patience_nothing_stops() -> None:
    history = EvaluationHistory()
    assert not any(history.add_value(1.0) and history.should_stop for _ in range(9))
    assert history.num_since_best == 8 and not history.should_stop


@pytest.mark.parametrize("metric", ["loss", "matthews"])
def test_a_resumed_run_has_the_history_of_its_metrics(metric: str, tmp_path: Path) -> None:
    values = (2.0, None, 1.0, 1.5, None)
    signed = values if metric == "loss" else [v and -v for v in values]
    records = [make_record(step, value, metric) for step, value in enumerate(signed, 1)]
    history = EvaluationHistory(1, metric)
    history.read_from_run(tmp_path, World())
    assert history == EvaluationHistory(1, metric) and history.best is None
    (tmp_path / METRICS_FILE).write_text("".join(map(format_line, records)))
    history.read_from_run(tmp_path, World())
    assert history.best == (metric, signed[2]) and history.num_since_best == 1
    assert history.should_stop
    whole = EvaluationHistory(1, metric)
    whole.add_records(records)
    assert whole == history


def test_a_higher_score_is_better() -> None:
    history = EvaluationHistory(metric="f1")
    found = [
        EvalResult(1.0, {}, ClassScores(accuracy=0.9, macro_f1=0.0, matthews=0.0, f1=f1))
        for f1 in (0.0, 0.5, 0.4, 0.6)
    ]
    assert [history.add_evaluation(one) for one in found] == [True, True, False, True]
    assert history.best == ("f1", 0.6)
