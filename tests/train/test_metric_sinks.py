"""Sinks alone; that all of them get each step is tested in ``test_metrics``."""

from pathlib import Path
from unittest import mock

import pytest

from dist_peft.core.errors import UserError
from dist_peft.train import metrics as metrics_module
from dist_peft.train.metric_sinks import METRIC_SINKS, JsonLinesSink, MetricSink
from dist_peft.train.step_metrics import StepMetrics, read_metrics

RECORD = StepMetrics(1, 1.5, 1e-4, 0.5, 1000, 250.0, 2**30, 2**20)


class ListSink:
    """Keeps what it gets; fails on the step ``FAILS``."""

    FAILS = 2

    def __init__(self, run_dir: Path, first_step: int) -> None:
        self.first_step, self.steps, self.is_closed = first_step, [], False

    def write_step(self, record: StepMetrics) -> None:
        if record.step == self.FAILS:
            raise OSError(28, "No space left on device")
        self.steps.append(record.step)

    def close(self) -> None:
        self.is_closed = True


def test_json_lines_drop_later_steps(tmp_path: Path) -> None:
    for first_step in (0, 0):
        sink = JsonLinesSink(tmp_path, first_step)
        sink.write_step(RECORD)
        sink.close()
    assert read_metrics(sink.path) == [RECORD]


def test_a_sink_of_ones_own_gets_each_step_and_is_closed(tmp_path: Path) -> None:
    made: list[ListSink] = []

    def make_sink(run_dir: Path, first_step: int) -> MetricSink:
        made.append(ListSink(run_dir, first_step))
        return made[-1]

    with mock.patch.object(metrics_module, "METRIC_SINKS", (*METRIC_SINKS, make_sink)):
        metrics = metrics_module.MetricsWriter(tmp_path, rank=0, first_step=0)
        metrics.write_step(RECORD)
        with pytest.raises(UserError, match="No space left on device; free space"):
            metrics.write_step(StepMetrics(2, 1.5, 1e-4, 0.5, 1000, 250.0, 2**30, 2**20))
    assert made[0].steps == [1] and made[0].is_closed
