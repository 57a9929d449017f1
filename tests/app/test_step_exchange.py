from typing import Any

import pytest

from dist_peft.app.step_exchange import ComputedGradients, StepBatches, StepGenerator, run_alone


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


def test_error_ends_the_loop_through_its_own_cleanup() -> None:
    seen: list[Any] = []
    with pytest.raises(RuntimeError, match="no memory"):
        run_alone(count_steps(3, seen), Training(fails_at=1))  # type: ignore[arg-type]
    assert seen == [(0.0, 10), "no memory"]
