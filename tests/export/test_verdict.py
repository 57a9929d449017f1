"""Figures become verdicts: each kind of failure is one, for each kind of form."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dist_peft.export.rounding_floor import RoundingFloor
from dist_peft.export.verdict import (
    VerificationError,
    is_above_exact_bound,
    judge_comparison,
)
from dist_peft.export.verify import Comparison, Probe, compare_logits

GOOD = Comparison(
    max_error=1e-3,
    mean_error=1e-4,
    relative=0.01,
    kl=1e-6,
    top1=1.0,
    kl_before=0.1,
    changed=True,
)
OUT = Path("out")


@pytest.mark.parametrize("exact", [True, False])
def test_good_figures_pass_without_a_word(exact: bool, caplog: pytest.LogCaptureFixture) -> None:
    judge_comparison(GOOD, OUT, exact=exact)
    assert not caplog.records


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("max_error", [None, 1e9])
@pytest.mark.parametrize("field", ["relative", "kl"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_figures_that_are_no_numbers_fail(
    exact: bool, max_error: float | None, field: str, value: float
) -> None:
    with pytest.raises(VerificationError, match=r"not finite.* out was written and is kept"):
        judge_comparison(replace(GOOD, **{field: value}), OUT, exact=exact, max_error=max_error)


def test_exact_forms_have_five_percent() -> None:
    judge_comparison(replace(GOOD, relative=0.05), OUT, exact=True)
    with pytest.raises(VerificationError, match=r"5\.1%.*at most 5\.0%.*hint.*--max-error"):
        judge_comparison(replace(GOOD, relative=0.051), OUT, exact=True, hint="hint")


def test_other_forms_warn_and_fail_where_the_adapter_is_lost(
    caplog: pytest.LogCaptureFixture,
) -> None:
    judge_comparison(replace(GOOD, relative=0.4), OUT, exact=False)
    assert "40.0%" in caplog.text
    for lost in (1.0, 11.48):
        with pytest.raises(VerificationError, match=r"at most 100\.0%"):
            judge_comparison(replace(GOOD, relative=lost), OUT, exact=False)
    with pytest.raises(VerificationError, match="no closer to the trained model"):
        judge_comparison(replace(GOOD, relative=0.4, kl=0.1), OUT, exact=False)


def test_bound_of_the_user_replaces_the_forms() -> None:
    judge_comparison(replace(GOOD, relative=0.2), OUT, exact=True, max_error=0.3)
    judge_comparison(replace(GOOD, relative=3.0, kl=5.0), OUT, exact=False, max_error=4.0)
    for exact in (True, False):
        with pytest.raises(VerificationError, match=r"--max-error allows at most 0\.5%"):
            judge_comparison(GOOD, OUT, exact=exact, max_error=0.005)


def test_training_that_changed_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """Another base is found all the same."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 4, 9, generator=generator)
    probe = Probe(torch.zeros(1, 4, dtype=torch.long), logits, logits.clone())
    judge_comparison(compare_logits(logits + 1e-6, probe), OUT, exact=True)
    assert "training changed nothing on the probe" in caplog.text
    other = torch.randn(1, 4, 9, generator=generator)
    for exact in (True, False):
        with pytest.raises(VerificationError):
            judge_comparison(compare_logits(other, probe), OUT, exact=exact)


ROUNDED = RoundingFloor(floor=0.1, error=0.14, kept=0.98)


def test_error_that_rounding_explains_is_accepted_with_both_figures(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "dist_peft")
    judge_comparison(replace(GOOD, relative=0.189), OUT, exact=True, rounding=ROUNDED)
    (record,) = caplog.records
    assert record.levelname == "INFO"
    for part in ("verified to the rounding", "18.9%", "14.0%", "10.0%", "98.0%", "More steps"):
        assert part in record.getMessage()


@pytest.mark.parametrize(
    ("relative", "rounding", "message"),
    [
        (0.21, ROUNDED, "rounding does not explain it: in float32 the error is 14.0%"),
        (0.189, replace(ROUNDED, error=0.16), "accepted are 1.5 times"),
        (0.189, replace(ROUNDED, kept=0.94), "94.0% of the change"),
        (0.189, replace(ROUNDED, kept=1.06), "95% to 105% of the change"),
        (0.189, replace(ROUNDED, error=math.nan), "does not explain it"),
        (0.189, replace(ROUNDED, kept=math.nan), "does not explain it"),
        (0.189, replace(ROUNDED, floor=math.nan), "NOT VERIFIED"),
        (0.3, RoundingFloor(0.21, 0.21, 1.0), "NOT VERIFIED: the rounding .* more than 20%"),
        (1.0, RoundingFloor(0.9, 0.9, 1.0), "NOT VERIFIED"),
    ],
)
def test_error_that_rounding_does_not_explain(
    relative: float, rounding: RoundingFloor, message: str
) -> None:
    with pytest.raises(VerificationError, match=message):
        judge_comparison(replace(GOOD, relative=relative), OUT, exact=True, rounding=rounding)


def test_rounding_explains_nothing_else() -> None:
    """Not an error above the user's bound, a lost divergence, or a form that re-quantizes."""
    found = replace(GOOD, relative=0.189)
    with pytest.raises(VerificationError, match="--max-error allows"):
        judge_comparison(found, OUT, exact=True, max_error=0.1, rounding=ROUNDED)
    with pytest.raises(VerificationError, match="no closer to the trained model"):
        judge_comparison(replace(found, kl=0.2), OUT, exact=True, rounding=ROUNDED)
    with pytest.raises(VerificationError, match=r"at most 100\.0%"):
        judge_comparison(replace(GOOD, relative=1.0), OUT, exact=False, rounding=ROUNDED)


def test_errors_that_get_a_second_look() -> None:
    assert is_above_exact_bound(replace(GOOD, relative=0.051))
    for other in (
        GOOD,
        replace(GOOD, relative=1.0),
        replace(GOOD, relative=math.nan),
        replace(GOOD, relative=0.2, kl=math.inf),
        replace(GOOD, relative=0.2, changed=False),
    ):
        assert not is_above_exact_bound(other)
