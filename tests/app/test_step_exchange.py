from collections.abc import Generator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from dist_peft.app.step_exchange import (
    ComputedGradients,
    HeldOutPass,
    StepBatches,
    StepGenerator,
    run_alone,
)
from dist_peft.core.stop_signals import StopRequested
from dist_peft.core.world import World


class Training:
    """Counts; fails at a given step."""

    def __init__(self, fails_at: int = -1) -> None:
        self.built, self.calls, self.fails_at = self, 0, fails_at
        self.engine, self.bytes_gathered = self, 0

    def forward_backward(self, batches: Any, targets: int) -> float:
        if self.calls == self.fails_at:
            raise RuntimeError("no memory")
        self.calls += 1
        self.bytes_gathered += 10
        return targets / 2


def count_steps(total: int, seen: list[Any]) -> StepGenerator:
    try:
        for step in range(total):
            found = yield StepBatches([], step)
            seen.append((found.loss, found.bytes_gathered))
    except RuntimeError as error:
        seen.append(str(error))
        raise
    return total


def test_each_step_is_computed() -> None:
    seen: list[Any] = []
    assert run_alone(count_steps(3, seen), Training()) == 3  # type: ignore[arg-type]
    assert seen == [(0.0, 10), (0.5, 10), (1.0, 10)]
    assert run_alone(count_steps(0, seen), Training()) == 0  # type: ignore[arg-type]
    assert ComputedGradients(1.0, 2.0, 3)._fields == ("loss", "seconds", "bytes_gathered")


class Held(Training):
    """With held-out data; a signal comes in the first evaluation."""

    loaders = SimpleNamespace(objective=None, eval="rows")
    model = None
    world = World()


def test_evaluations_and_signals_in_them() -> None:
    def evaluate_twice() -> Generator[HeldOutPass, Any, list[str]]:
        found = []
        for step in range(2):
            try:
                found.append((yield HeldOutPass(step)))
            except StopRequested:
                found.append("stopped")
        return found

    path = "dist_peft.app.step_exchange.evaluate_model"
    with mock.patch(path, side_effect=[StopRequested, "result"]) as called:
        found = run_alone(evaluate_twice(), Held())  # type: ignore[arg-type]
    assert found == ["stopped", "result"]
    assert called.call_args.args[3] == "rows"


def test_error_ends_the_loop_through_its_own_cleanup() -> None:
    seen: list[Any] = []
    with pytest.raises(RuntimeError, match="no memory"):
        run_alone(count_steps(3, seen), Training(fails_at=1))  # type: ignore[arg-type]
    assert seen == [(0.0, 10), "no memory"]
