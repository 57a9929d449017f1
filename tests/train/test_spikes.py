"""Spikes: outliers above, not trends, not noise, not the first steps; a resume knows the past."""

import math
import random
from pathlib import Path

import pytest

from dist_peft.core.world import World
from dist_peft.train.metrics import MetricsWriter
from dist_peft.train.spikes import FEWEST, WINDOW, SpikeDetector
from dist_peft.train.step_metrics import StepMetrics


def falling_losses(count: int) -> list[float]:
    noise = random.Random(0)
    return [2 + 3 * math.exp(-step / 50) + noise.gauss(0, 0.1) for step in range(count)]


def test_outlier_is_scored_in_robust_standard_deviations() -> None:
    losses = [1.0, 1.1, 0.9, 1.2, 0.8] * 4
    score = SpikeDetector(6.0, losses).add_loss(3.0)
    assert score == pytest.approx((3.0 - 1.0) / (1.4826 * 0.1))


def test_falling_noisy_curve_has_no_spike_and_outliers_do_not_hide_each_other() -> None:
    losses = falling_losses(1000)
    detector = SpikeDetector(6.0)
    assert not any(detector.add_loss(loss) for loss in losses)
    planted = {300: 4.0, 301: 4.0, 302: 4.0, 700: 9.0}
    detector = SpikeDetector(6.0)
    found = [s for s, x in enumerate(losses) if detector.add_loss(planted.get(s, x)) is not None]
    assert found == list(planted)


def test_first_steps_low_losses_and_constants_are_no_spikes() -> None:
    detector = SpikeDetector(6.0)
    assert [detector.add_loss(100.0 * n) for n in range(FEWEST)] == [None] * FEWEST
    assert SpikeDetector(6.0, [2.0] * WINDOW).add_loss(0.1) is None
    assert SpikeDetector(6.0, [2.0] * WINDOW).add_loss(2.01) is None
    assert SpikeDetector(6.0, [2.0] * WINDOW).add_loss(2.5) == pytest.approx(25.0)
    assert SpikeDetector(0.0, [2.0] * WINDOW).add_loss(1e9) is None
    detector = SpikeDetector(6.0, [2.0] * WINDOW)
    assert detector.add_loss(math.nan) is None and detector.median == 2.0
    assert math.isnan(SpikeDetector(6.0).median)


def test_resume_scores_as_if_nothing_had_happened(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    losses = falling_losses(WINDOW + 9)
    whole = SpikeDetector(6.0, losses)
    with MetricsWriter(tmp_path, 0) as metrics:
        for step, loss in enumerate(losses, 1):
            metrics.write_step(StepMetrics(step, loss, 1e-4, 1.0, 1, 1.0, 1, 0))
    resumed = SpikeDetector.read_from_run(tmp_path, 6.0, World())
    assert resumed.log_loss(74, 60.0) == whole.add_loss(60.0) is not None
    assert "step 74: loss 60.0000 is a spike: " in caplog.text
