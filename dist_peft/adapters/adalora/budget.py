"""AdaLoRA's budget: how many triplets are kept at a step, and which.

Zhang et al. 2023, algorithm 1 and equation 12, as PEFT's ``RankAllocator`` computes it. A triplet
is a row of ``A``, a number of ``E`` and a column of ``B``. With ``t`` the number of updates made,
``T`` that of the run, ``b0`` triplets at the start and ``b1`` at the end::

    t <= tinit              b = b0, nothing is masked
    tinit < t < T - tfinal  b = b1 + (b0 - b1) (1 - (t - tinit) / (T - tfinal - tinit))^3
                            masked where t is a multiple of delta_t
    t >= T - tfinal         b = b1, masked in every step by the scores of T - tfinal

Masking sets ``E`` of all but the ``b`` triplets of the largest scores to zero. Before
``T - tfinal`` the others are trained on and may come back.

    score = S(E_i) + mean_j S(A_ij) + mean_j S(B_ji)        S = sensitivity * uncertainty
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["BudgetSchedule", "choose_kept_triplets", "score_triplets"]


@dataclass(frozen=True)
class BudgetSchedule:
    """The schedule of one run.

    Attributes:
        first, last: triplets at the start and at the end, of all modules together.
        tinit, tfinal, delta_t: see the module.
        total_steps: of the run.
    """

    first: int
    last: int
    tinit: int
    tfinal: int
    delta_t: int
    total_steps: int

    @property
    def final_step(self) -> int:
        """Updates after which the masks do not change any more."""
        return self.total_steps - self.tfinal

    def counts_importance(self, done: int) -> bool:
        """Return whether the update that makes it ``done`` counts in the importances."""
        return done < self.final_step

    def get_budget(self, done: int) -> int | None:
        """Return how many triplets are kept after ``done`` updates; None: no masking then."""
        if done >= self.final_step:
            return self.last
        if done <= self.tinit or done % self.delta_t:
            return None
        left = 1 - (done - self.tinit) / (self.final_step - self.tinit)
        return int((self.first - self.last) * left**3 + self.last)


def score_triplets(
    sensitivity: tuple[Tensor, Tensor, Tensor], uncertainty: tuple[Tensor, Tensor, Tensor]
) -> Tensor:
    """Return the scores ``[r]`` of a module.

    Args:
        sensitivity, uncertainty: of ``A`` [r, in], ``E`` [r] and ``B`` [out, r], whole, float32.
    """
    a, e, b = (s * u for s, u in zip(sensitivity, uncertainty, strict=True))
    return e + torch.stack([a.mean(1), b.mean(0)], 1).sum(1)


def choose_kept_triplets(scores: Sequence[Tensor], budget: int) -> list[Tensor]:
    """Return which triplets of each module are kept: those above the ``n - budget`` th score.

    Args:
        scores: ``[r]`` of each module.
        budget: of all modules together. Equal scores are dropped together, as in PEFT.
    """
    every = torch.cat(list(scores))
    dropped = len(every) - budget
    if dropped <= 0:
        return [torch.ones_like(own, dtype=torch.bool) for own in scores]
    threshold = torch.kthvalue(every, dropped).values
    return [own > threshold for own in scores]
