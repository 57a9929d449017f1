"""How evenly the ranks work: memory of the fullest, rates, and the share that the slowest costs.

Ranks wait for each other in every step, so that all take the same wall time ``t``; the difference
is in how much of it they work. With the CPU seconds ``c_r`` that the process of rank ``r`` spends
in a step, the straggler share is ::

    (max_r c_r - min_r c_r) / max_r c_r

the share of the slowest rank's work for which the fastest one has nothing to do. With its target
tokens ``n_r``, the rate of a rank is that at which it would go if it waited for no slower one::

    n_r / (t c_r / max_r c_r)

Threads that wait for a collective sleep on CPUs. On a GPU neither the process nor the device sleeps
while it waits: neither share nor slowest rank are measured there, and the rates are ``n_r / t``.

All of it needs no collective of its own: the exchange of a step takes maxima over the ranks, and
each rank puts its ``c_r`` into a place of its own, where the others have 0.
"""

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from dist_peft.core.world import World
from dist_peft.train.metrics import read_peak_memory_bytes

__all__ = ["StepLoad"]


class StepLoad:
    """The load of this rank in one step; made at its beginning.

    Args:
        device: that the rank computes on.
        world: of the ranks.
    """

    def __init__(self, device: torch.device, world: World) -> None:
        self.device, self._place, self._ranks = device, world.data_rank, world.data_size
        self._begin = time.process_time()

    def list_exchanged(self) -> list[float]:
        """Return ``2 + ranks`` numbers of this rank, of whose maxima over the ranks
        ``describe_maxima`` takes."""
        seconds = time.process_time() - self._begin
        reserved = 0
        if self.device.type == "cuda":
            reserved = torch.cuda.max_memory_reserved(self.device)
        places = [0.0] * self._ranks
        places[self._place] = seconds
        return [read_peak_memory_bytes(self.device), reserved, *places]

    def describe_maxima(
        self, maxima: Sequence[float], targets: Sequence[int], seconds: float
    ) -> dict[str, Any]:
        """Return fields of ``StepMetrics``: ``mem_peak``, ``mem_reserved``, ``straggler_share``,
        ``rank_rate_min``, ``rank_rate_median``, ``rank_rate_max`` and ``slowest_rank``.

        Args:
            maxima: of ``list_exchanged``, over the ranks.
            targets: target tokens of each rank in the step.
            seconds: wall time of the step.
        """
        memory, reserved, *work = maxima
        found = {"mem_peak": int(memory), "mem_reserved": int(reserved) or None}
        if self._ranks == 1 or seconds <= 0:  # one rank waits for none
            return {**found, "straggler_share": None}
        most = max(work)
        if self.device.type != "cpu" or min(work) <= 0:
            return {
                **found,
                "straggler_share": None,
                **_describe_rates(targets, [seconds] * len(work)),
            }
        rates = _describe_rates(targets, [seconds * own / most for own in work])
        share = (most - min(work)) / most
        return {**found, "straggler_share": share, **rates, "slowest_rank": work.index(most)}


def _describe_rates(targets: Sequence[int], seconds: Sequence[float]) -> dict[str, float]:
    rates = [count / own for count, own in zip(targets, seconds, strict=True)]
    return {
        "rank_rate_min": min(rates),
        "rank_rate_median": statistics.median(rates),
        "rank_rate_max": max(rates),
    }
