"""Accept or reject a verified export: map the figures of a comparison to an exit code.

Forms that keep the trained function (the base as training saw it with the adapter merged, QA-LoRA's
codes with the adapter in the zeros, a separate adapter) may differ by rounding only. Forms that
re-quantize, or that merge into another base than training saw, differ by the quantization error,
which is reported and can be bounded by the user; they fail if the adapter's effect is lost.

An output that exceeds the bound of the first kind, of a run in a 16-bit type, gets a second look in
float32 (``export.rounding_floor``): where rounding alone explains the error, it is accepted.
"""

import logging
import math
from pathlib import Path

from dist_peft.export.rounding_floor import FLOOR_FACTOR, MAX_FLOOR, RoundingFloor
from dist_peft.export.verify import EXACT_BOUND, Comparison

__all__ = ["VerificationError", "is_above_exact_bound", "judge_comparison"]

log = logging.getLogger("dist_peft")

_LOST = 1.0


class VerificationError(RuntimeError):
    """The output does not match the trained model; the command ends with exit code 1."""


def is_above_exact_bound(found: Comparison) -> bool:
    """Return whether a form that keeps the trained function needs an explanation of its error.

    An output that lost the adapter, or has logits that are not finite, needs none: it is wrong.
    """
    return found.changed and EXACT_BOUND < found.relative < _LOST and math.isfinite(found.kl)


def judge_comparison(
    found: Comparison,
    path: Path,
    *,
    exact: bool,
    max_error: float | None = None,
    hint: str = "",
    rounding: RoundingFloor | None = None,
    lost: str = "no closer to the trained model than the untrained base is: the adapter is lost",
) -> None:
    """Accept an export, warn about its error, or reject it.

    Args:
        found: comparison with the trained model.
        path: the written file or directory; it is kept for inspection.
        exact: the form keeps the trained function.
        max_error: a bound that replaces the form's, as a share of the change by training.
        hint: a remedy to mention along with an error.
        rounding: the second look in float32 of an exact form of a 16-bit run whose error is above
            the bound; None: there was none.
        lost: words for an output whose divergence is not below that of the other model.

    Raises:
        VerificationError: the error is above the bound or not finite, or the adapter is lost.
    """
    error = f"an error of {found.relative:.1%} of the change by training on the probe"
    tail = f"{'; ' + hint if hint else ''}. {path} was written and is kept, but is not as requested"
    if not (math.isfinite(found.relative) and math.isfinite(found.kl)):
        raise VerificationError(f"{path} returns logits that are not finite ({error}){tail}")
    explained = False
    if rounding is not None and exact and max_error is None:
        explained = found.relative < _LOST and rounding.explains_error(found.relative)
        tail = tail if explained else f"; {_explain_rejection(rounding)}{tail}"
    bound = max_error if max_error is not None else EXACT_BOUND if exact else _LOST
    above = found.relative > bound or (max_error is None and found.relative >= _LOST)
    if above and not explained:
        kind = "keeps the trained function and may differ by" if exact else "may have"
        asked = "--max-error allows" if max_error is not None else f"this form {kind}"
        raise VerificationError(
            f"{path} has {error}; {asked} at most {bound:.1%}{tail}; --max-error sets another bound"
        )
    if max_error is None and found.changed and found.kl >= found.kl_before:
        raise VerificationError(
            f"{path} is {lost} (KL {found.kl:.2e} nats against {found.kl_before:.2e}){tail}; "
            "--max-error sets another bound"
        )
    if explained:
        log.info(
            "verified to the rounding of 16-bit training: %s has %s; %s. More steps, or "
            "base.compute_dtype float32, give a sharper check",
            *(path, error, rounding),
        )
        return
    if not found.changed:
        log.warning(
            "training changed nothing on the probe: the error is relative to the standard "
            "deviation of the logits instead"
        )
    if found.relative > EXACT_BOUND:
        log.warning("%s has %s%s", path, error, f"; {hint}" if hint else "")


def _explain_rejection(rounding: RoundingFloor) -> str:
    """Return why a second look did not accept an output."""
    advice = "a run of more steps, or in base.compute_dtype float32, is compared more sharply"
    if not rounding.is_conclusive:
        return (
            f"NOT VERIFIED: the rounding of 16-bit training is more than {MAX_FLOOR:.0%} of the "
            f"change, so that nothing can be said ({rounding}); {advice}"
        )
    return (
        f"rounding does not explain it: {rounding}; accepted are {FLOOR_FACTOR} times that "
        f"rounding, and {1 - EXACT_BOUND:.0%} to {1 + EXACT_BOUND:.0%} of the change; {advice}"
    )
