import json
import math
from pathlib import Path

import pytest

from dist_peft.app.sweep.halving import choose_stopped, read_held_out_losses
from dist_peft.core.config.run import HalvingConfig
from dist_peft.core.errors import UserError
from dist_peft.core.world import World
from dist_peft.train.metrics import MetricsWriter
from dist_peft.train.step_metrics import StepMetrics


@pytest.mark.parametrize(
    ("keep", "losses", "stopped"),
    [
        (0.5, [3.0, 1.0, 2.0, 4.0], [0, 3]),
        (0.5, [3.0, 1.0, 2.0], [0]),
        (0.5, [1.0, 1.0], [1]),
        (0.1, [3.0, 1.0, 2.0, 4.0], [0, 2, 3]),
        (0.5, [math.nan, 9.0], [0]),
        (0.5, [2.0], []),
        (2 / 3, [1.0, 2.0, 3.0], [2]),
    ],
)
def test_worst_points_stop(keep: float, losses: list[float], stopped: list[int]) -> None:
    halving = HalvingConfig(every=2, keep=keep)
    assert choose_stopped(halving, dict(enumerate(losses))) == stopped


def test_losses_are_those_of_the_step(tmp_path: Path) -> None:
    for name, loss in (("a", 2.5), ("b", 1.5)):
        with MetricsWriter(tmp_path / name, 0) as metrics:
            metrics.write_step(StepMetrics(1, 9.0, 0.1, 1.0, 1, 1.0, 0, 0, eval_loss=loss))
            metrics.write_step(StepMetrics(2, 9.0, 0.1, 1.0, 1, 1.0, 0, 0))
    directories = {4: tmp_path / "a", 7: tmp_path / "b"}
    assert read_held_out_losses(directories, 1, World()) == {4: 2.5, 7: 1.5}
    with pytest.raises(UserError, match=r"has no held-out loss of step 2; start over"):
        read_held_out_losses(directories, 2, World())
    assert json.loads((tmp_path / "a/metrics.jsonl").read_text().splitlines()[0])["step"] == 1
