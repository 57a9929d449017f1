"""When training stops for want of a lower held-out loss."""

import math
from dataclasses import fields
from pathlib import Path
from typing import Any

from dist_peft.core.world import World
from dist_peft.train.eval_history import EvaluationHistory
from dist_peft.train.step_metrics import METRICS_FILE, StepMetrics, format_line


def make_record(step: int, loss: float | None) -> StepMetrics:
    values: dict[str, Any] = {
        f.name: 1 for f in fields(StepMetrics) if not f.name.startswith("eval")
    }
    return StepMetrics(**{**values, "step": step, "eval_loss": loss})


def test_patience_counts_evaluations_without_a_lower_loss() -> None:
    history = EvaluationHistory(patience=2)
    losses = (3.0, 2.0, 2.0, 1.9, math.nan, 2.5)
    assert [history.add_loss(loss) for loss in losses] == [True, True, False, True, False, False]
    assert history.best_loss == 1.9 and history.should_stop
    assert history.add_loss(1.8) and not history.should_stop


def test_without_patience_nothing_stops() -> None:
    history = EvaluationHistory()
    assert not any(history.add_loss(1.0) and history.should_stop for _ in range(9))
    assert history.num_since_best == 8 and not history.should_stop


def test_a_resumed_run_has_the_history_of_its_metrics(tmp_path: Path) -> None:
    records = [make_record(step, loss) for step, loss in enumerate((2.0, None, 1.0, 1.5, None), 1)]
    history = EvaluationHistory.from_metrics(records, 1)
    assert (history.best_loss, history.num_since_best, history.should_stop) == (1.0, 1, True)
    assert EvaluationHistory.read_from_run(tmp_path, 1, World()) == EvaluationHistory(1)
    (tmp_path / METRICS_FILE).write_text("".join(map(format_line, records)))
    assert EvaluationHistory.read_from_run(tmp_path, 1, World()) == history
