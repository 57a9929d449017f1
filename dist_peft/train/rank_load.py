"""How evenly the ranks work: memory of the fullest, and the share that the slowest costs.

Ranks wait for each other in every step, so that all take the same wall time; the difference is in
how much of it they work. With the CPU seconds ``c_r`` that the process of rank ``r`` spends in a
step, the straggler share is ::

    (max_r c_r - min_r c_r) / max_r c_r

the share of the slowest rank's work for which the fastest one has nothing to do. Threads that wait
for a collective sleep on CPUs. On a GPU neither the process nor the device sleeps while it
waits, so the share is not measured there.
"""

import time
from collections.abc import Sequence
from typing import Any

import torch

from dist_peft.train.metrics import read_peak_memory_bytes

__all__ = ["StepLoad"]


class StepLoad:
    """The load of this rank in one step; made at its beginning."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._begin = time.process_time()

    def list_exchanged(self) -> list[float]:
        """Return numbers of this rank whose maxima over the ranks ``describe_maxima`` takes."""
        seconds = time.process_time() - self._begin
        reserved = 0
        if self.device.type == "cuda":
            reserved = torch.cuda.max_memory_reserved(self.device)
        return [read_peak_memory_bytes(self.device), reserved, seconds, -seconds]

    def describe_maxima(self, maxima: Sequence[float], ranks: int) -> dict[str, Any]:
        """Return fields of ``StepMetrics``: ``mem_peak``, ``mem_reserved``, ``straggler_share``.

        Args:
            maxima: of ``list_exchanged``, over the ranks.
            ranks: their number; one rank waits for none.
        """
        memory, reserved, most, least = maxima
        share = None
        if ranks > 1 and self.device.type == "cpu" and most > 0:
            share = (most + least) / most
        return {
            "mem_peak": int(memory),
            "mem_reserved": int(reserved) or None,
            "straggler_share": share,
        }
