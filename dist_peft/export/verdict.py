"""Accept or reject a verified export: map the figures of a comparison to an exit code.

Forms that keep the trained function (the base as training saw it with the adapter merged, QA-LoRA's
codes with the adapter in the zeros, a separate adapter) may differ by rounding only. Forms that
re-quantize, or that merge into another base than training saw, differ by the quantization error,
which is reported and can be bounded by the user; they fail if the adapter's effect is lost.
"""

import logging
import math
from pathlib import Path

from dist_peft.export.verify import Comparison

__all__ = ["EXACT_BOUND", "VerificationError", "judge_comparison"]

log = logging.getLogger("dist_peft")

EXACT_BOUND = 0.05
"""Maximum error of a form that keeps the trained function, relative to the change by training."""

_LOST = 1.0


class VerificationError(RuntimeError):
    """The output does not match the trained model; the command ends with exit code 1."""


def judge_comparison(
    found: Comparison,
    path: Path,
    *,
    exact: bool,
    max_error: float | None = None,
    hint: str = "",
    lost: str = "no closer to the trained model than the untrained base is: the adapter is lost",
) -> None:
    """Accept an export, warn about its error, or reject it.

    Args:
        found: comparison with the trained model.
        path: the written file or directory; it is kept for inspection.
        exact: the form keeps the trained function.
        max_error: a bound that replaces the form's, as a share of the change by training.
        hint: a remedy to mention along with an error.
        lost: words for an output whose divergence is not below that of the other model.

    Raises:
        VerificationError: the error is above the bound or not finite, or the adapter is lost.
    """
    error = f"an error of {found.relative:.1%} of the change by training on the probe"
    tail = f"{'; ' + hint if hint else ''}. {path} was written and is kept, but is not as requested"
    if not (math.isfinite(found.relative) and math.isfinite(found.kl)):
        raise VerificationError(f"{path} returns logits that are not finite ({error}){tail}")
    bound = max_error if max_error is not None else EXACT_BOUND if exact else _LOST
    if found.relative > bound or (max_error is None and found.relative >= _LOST):
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
    if not found.changed:
        log.warning(
            "training changed nothing on the probe: the error is relative to the standard "
            "deviation of the logits instead"
        )
    if found.relative > EXACT_BOUND:
        log.warning("%s has %s%s", path, error, f"; {hint}" if hint else "")
