"""The learning rate over a run, as a factor of its peak.

With ``T`` steps in all and ``w`` steps of warm-up, the factor of step ``s`` (0, 1, ...) is::

    s <= w    (s + 1) / (w + 1)                       linear, 1 at s = w
    s >= w    m + (1 - m) f(p),  p = (s - w) / (T - w)

    cosine    f(p) = (1 + cos(pi p)) / 2              (SGDR without restarts, Loshchilov & Hutter
    linear    f(p) = 1 - p                             2017)
    constant  f(p) = 1                                for any m

    1 |     __
      |    /  `.
      |   /     `.          m is ``min_ratio``; it is reached at s = T, one step after the last,
    m |  /        `.__      so that no step of a run with m = 0 is wasted on a factor of 0
      +-|--|---------|-> s
        0  w         T
"""

import math
from typing import Literal

__all__ = ["compute_lr_factor", "count_warmup_steps"]


def count_warmup_steps(total: int, warmup: float) -> int:
    """Return the warm-up steps: below 1, ``warmup`` is a share of ``total`` (rounded), else steps.

    At most ``total - 1``: a warm-up longer than the run reaches the peak with the last step.
    """
    steps = round(total * warmup) if warmup < 1 else int(warmup)
    return min(steps, total - 1)


def compute_lr_factor(
    step: float,
    total: int,
    warmup: float,
    schedule: Literal["cosine", "linear", "constant"],
    min_ratio: float,
) -> float:
    """Return the factor of the peak learning rate, in (0, 1] for ``0 <= step < total``.

    Args:
        step: steps done so far; the first step has 0. From ``total`` on the factor is the last.
        total: steps of the run, at least 1.
        warmup: as in ``count_warmup_steps``.
        schedule: shape after the warm-up.
        min_ratio: factor at ``step == total`` in [0, 1]; without effect on ``constant``.
    """
    if total < 1 or step < 0:
        raise ValueError(f"step {step} of a run of {total} steps does not exist")
    ramp = count_warmup_steps(total, warmup)
    if step < ramp:
        return (step + 1) / (ramp + 1)
    progress = min((step - ramp) / (total - ramp), 1.0)
    if schedule == "constant":
        return 1.0
    if schedule == "linear":
        share = 1.0 - progress
    else:
        # (1 + cos x) / 2 = cos(x/2)**2, which does not cancel to 0 just before the end
        share = math.cos(math.pi / 2 * progress) ** 2 if progress < 1 else 0.0
    return min_ratio + (1.0 - min_ratio) * share
