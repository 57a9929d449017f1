"""Held-out losses of several adapters by one pass over their common base.

Batch ``i`` of all adapters' held-out data, which are the same records unless their data differ, is
computed at once, as micro-batches are in training (``train.joined_step``). Sums are kept apart, so
that each result is that of the adapter's evaluation alone, up to the rounding of larger products.
"""

import itertools
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from dist_peft.core.progress_beat import mark_progress
from dist_peft.core.world import World
from dist_peft.data.loader import Batch, Loader
from dist_peft.train.evaluate import EvalResult, HeldOutSums, enter_evaluation
from dist_peft.train.objective import TokenObjective

__all__ = ["evaluate_together"]

ComputeStatistics = Callable[[Mapping[int, Batch]], Mapping[int, Tensor]]
"""Maps a batch of each adapter, by number, to the statistics of its sequences."""


def evaluate_together(
    model: nn.Module,
    loaders: Mapping[int, Loader[Any]],
    compute: ComputeStatistics,
    world: World,
) -> dict[int, EvalResult]:
    """Return the held-out loss of each adapter, by its number. Collective.

    Args:
        model: with all adapters.
        loaders: of their held-out data, by number; those with fewer batches are left out of the
            last passes.

    Raises:
        StopRequested: on every rank, between two batches, after a signal to any.
    """
    sums = {number: HeldOutSums(TokenObjective(), loader) for number, loader in loaders.items()}
    batches = [loader.load_all_sequential() for loader in loaders.values()]
    with enter_evaluation(model):
        for row in itertools.zip_longest(*batches):
            mark_progress()
            world.raise_if_stop_requested()
            own = {k: batch for k, batch in zip(loaders, row, strict=True) if batch is not None}
            for number, statistics in compute(own).items():
                sums[number].add_batch(own[number], statistics)
    return {number: found.compute_result(world) for number, found in sums.items()}
