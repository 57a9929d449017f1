"""The learning rate curve: values by hand, then what holds for every run."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_peft.train.lr_schedule import compute_lr_factor, count_warmup_steps

totals = st.integers(1, 5000)
warmups = st.one_of(st.floats(0, 0.999), st.integers(1, 6000).map(float))
schedules = st.sampled_from(["cosine", "linear", "constant"])
ratios = st.floats(0, 1)


def test_values_by_hand() -> None:
    ramp = [compute_lr_factor(s, 10, 4, "linear", 0.0) for s in range(5)]
    assert ramp == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    linear = [compute_lr_factor(s, 10, 4, "linear", 0.1) for s in range(4, 11)]
    assert linear == pytest.approx([1.0, 0.85, 0.7, 0.55, 0.4, 0.25, 0.1])
    cosine = [compute_lr_factor(s, 8, 0, "cosine", 0.2) for s in range(9)]
    expected = [0.2 + 0.8 * (1 + math.cos(math.pi * s / 8)) / 2 for s in range(9)]
    assert cosine == pytest.approx(expected)


@pytest.mark.parametrize(
    ("total", "warmup", "steps"),
    [(100, 0, 0), (100, 0.03, 3), (100, 0.29, 29), (10, 0.03, 0), (100, 1, 1), (100, 25, 25)],
)
def test_below_one_is_a_share(total: int, warmup: float, steps: int) -> None:
    assert count_warmup_steps(total, warmup) == steps


def test_too_long_a_warmup_reaches_the_peak_with_the_last_step() -> None:
    assert count_warmup_steps(5, 1000) == 4
    assert compute_lr_factor(4, 5, 1000, "cosine", 0.0) == 1.0
    assert count_warmup_steps(5, 0.999) == 4
    assert compute_lr_factor(0, 1, 100, "cosine", 0.0) == 1.0


@given(totals, warmups, schedules, ratios, st.data())
def test_within_zero_and_one(
    total: int, warmup: float, schedule: str, ratio: float, data: st.DataObject
) -> None:
    step = data.draw(st.integers(0, total - 1))
    assert 0 < compute_lr_factor(step, total, warmup, schedule, ratio) <= 1


@given(totals, warmups, st.sampled_from(["cosine", "linear"]), ratios, st.integers(0, 100))
def test_ends_at_min_ratio(
    total: int, warmup: float, schedule: str, ratio: float, beyond: int
) -> None:
    assert compute_lr_factor(total + beyond, total, warmup, schedule, ratio) == ratio


@given(totals, warmups, ratios, st.integers(0, 6000))
def test_constant_stays_at_the_peak(total: int, warmup: float, ratio: float, later: int) -> None:
    step = count_warmup_steps(total, warmup) + later
    assert compute_lr_factor(step, total, warmup, "constant", ratio) == 1


@given(totals, warmups, schedules, ratios)
def test_rises_to_one_then_never_rises(
    total: int, warmup: float, schedule: str, ratio: float
) -> None:
    peak = count_warmup_steps(total, warmup)
    curve = [compute_lr_factor(s, total, warmup, schedule, ratio) for s in range(total + 1)]
    assert curve[peak] == 1
    assert all(a < b for a, b in pairwise(curve[: peak + 1]))
    assert all(a >= b for a, b in pairwise(curve[peak:]))


@given(totals, warmups, schedules, ratios, st.floats(0, 1))
def test_continuous(total: int, warmup: float, schedule: str, ratio: float, share: float) -> None:
    """A tiny move of the step moves the factor by no more than the steepest slope allows."""
    tiny = 1e-6
    step = share * total
    a, b = (compute_lr_factor(s, total, warmup, schedule, ratio) for s in (step, step + tiny))
    ramp = count_warmup_steps(total, warmup)
    steepest = max(1 / (ramp + 1), math.pi / 2 / (total - ramp))
    assert abs(a - b) <= steepest * tiny + 1e-9


@pytest.mark.parametrize(("step", "total"), [(-1, 10), (0, 0)])
def test_impossible_steps_are_refused(step: int, total: int) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        compute_lr_factor(step, total, 0, "cosine", 0.0)
