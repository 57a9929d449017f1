"""Whether a verified export is what it has to be: the figures of a comparison become an exit code.

Forms that keep the trained function (the base as training saw it with the adapter merged, QA-LoRA's
codes with the adapter in the zeros, an adapter kept apart) may differ by rounding only. Forms that
quantize anew, or that merge into another base than training saw, differ by what quantization costs,
which the user is told and may bound; they fail where nothing of the adapter is left.
"""

import logging
import math
from pathlib import Path

from dist_peft.export.verify import Comparison

__all__ = ["EXACT_BOUND", "VerificationError", "judge"]

log = logging.getLogger("dist_peft")

EXACT_BOUND = 0.05
"""Largest error of a form that keeps the trained function, over what training changed."""

_LOST = 1.0


class VerificationError(RuntimeError):
    """What was written is not the trained model: the command ends with exit code 1."""


def judge(
    found: Comparison, path: Path, *, exact: bool, max_error: float | None = None, hint: str = ""
) -> None:
    """Accept what was written, warn of its error, or refuse it.

    Args:
        found: its distance to the trained model.
        path: what was written; it stays on the disk, for a look at it.
        exact: the form keeps the trained function.
        max_error: another bound, as a share of what training changed; it replaces the form's.
        hint: what else the user can do about an error.

    Raises:
        VerificationError: the error is above the bound or no number, or the adapter is lost.
    """
    error = f"an error of {found.relative:.1%} of what training changed on the probe"
    tail = f"{'; ' + hint if hint else ''}. {path} was written and is kept, but not what was asked"
    if not (math.isfinite(found.relative) and math.isfinite(found.kl)):
        raise VerificationError(f"{path} gives logits that are not finite (error {error}){tail}")
    bound = max_error if max_error is not None else EXACT_BOUND if exact else _LOST
    if found.relative > bound or (max_error is None and found.relative >= _LOST):
        kind = "keeps the trained function and may differ by" if exact else "may have"
        asked = "--max-error allows" if max_error is not None else f"this form {kind}"
        raise VerificationError(
            f"{path} has {error}; {asked} at most {bound:.1%}{tail}; --max-error sets another bound"
        )
    if max_error is None and found.changed and found.kl >= found.kl_before:
        raise VerificationError(
            f"{path} is no nearer to the trained model than the untrained base is (KL "
            f"{found.kl:.2e} nats against {found.kl_before:.2e}): the adapter is lost{tail}; "
            "--max-error sets another bound"
        )
    if not found.changed:
        log.warning(
            "training changed nothing on the probe: the error is measured against the spread of "
            "the logits instead"
        )
    if found.relative > EXACT_BOUND:
        log.warning("%s has %s%s", path, error, f"; {hint}" if hint else "")
