"""Block influence, and the blocks with the least of it.

Men et al. 2024, "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect".
With the hidden states ``h_i`` before block ``i``::

    influence_i = 1 - mean over tokens of cos(h_i, h_(i+1))

A block that hardly turns the hidden states can be left out. All influences are those of the whole
model; the paper removes blocks in one shot, too.
"""

import logging
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from dist_peft.compress.block_loop import BlockLoop
from dist_peft.compress.prune_driver import NO_CALIBRATION_ADVICE
from dist_peft.core.errors import UserError
from dist_peft.core.host_memory import return_freed_memory
from dist_peft.core.progress_beat import SETUP_PATIENCE, enter_phase
from dist_peft.core.world import World
from dist_peft.engine import Engine
from dist_peft.model.skeleton import Skeleton
from dist_peft.quant.sparsity import Sparsity
from dist_peft.store.reader import RowReader

__all__ = ["count_dropped_blocks", "measure_block_influence", "select_kept_blocks"]

log = logging.getLogger("dist_peft")

_UNIT = 2.0**40
"""Fixed point of the mean cosine of a sample: integer sums do not depend on their order."""


def count_dropped_blocks(sparsity: Sparsity, blocks: int) -> int:
    """Return how many of ``blocks`` are dropped: the share, rounded to the nearest number.

    Raises:
        UserError: a pattern N:M, or no block or every block is dropped.
    """
    if sparsity.group:
        raise UserError(
            f"--method blocks drops whole blocks, and --sparsity {sparsity} is a pattern of "
            "weights; give a share of the blocks such as 0.25"
        )
    count = round(sparsity.share * blocks)
    if not 0 < count < blocks:
        raise UserError(
            f"--sparsity {sparsity} drops {count} of {blocks} blocks; give a share of the blocks "
            f"from {1 / blocks:.2g} to {(blocks - 1) / blocks:.2g}"
        )
    return count


def select_kept_blocks(influence: Sequence[float], dropped: int) -> list[int]:
    """Return the numbers of the blocks that stay, ascending; of equal ones the first go first."""
    by_influence = sorted(range(len(influence)), key=lambda number: (influence[number], number))
    return sorted(by_influence[dropped:])


@torch.no_grad()
def measure_block_influence(
    skeleton: Skeleton,
    engine: Engine,
    windows: Tensor,
    world: World,
    stop: Callable[[], bool] = lambda: False,
) -> list[float]:
    """Return the influence of each block, equal on every rank.

    Args:
        skeleton: a model without adapter, its weights loaded and sharded by ``engine``.
        windows: calibration tokens ``[samples, tokens]``, equal on every rank.
        stop: polled after each sample of the first forward and before each block; true on one rank
            stops all.

    Raises:
        StopRequested: ``stop`` returned true.
        UserError: on every rank: non-finite hidden states.
    """
    patience = enter_phase("block influence", 2 * SETUP_PATIENCE)
    with RowReader(skeleton.index) as reader, return_freed_memory(), patience:
        meter = _InfluenceMeter(skeleton, engine, windows, world, reader, stop)
        meter.influence = []
        meter.solve_all_blocks()
    return meter.influence


class _InfluenceMeter(BlockLoop):
    label, advice = "block influence", NO_CALIBRATION_ADVICE
    influence: list[float]

    def _solve_block(self, number: int, block: nn.Module) -> None:
        """Leave the block as it is."""

    def _finish_block(self, number: int, block: nn.Module) -> None:
        total, finite = torch.zeros(1, dtype=torch.int64, device=self.device), True
        for position, sample in enumerate(self.samples):
            output = sample.run_block(block, number)
            cosines = functional.cosine_similarity(sample.hidden.float(), output.float(), dim=-1)
            mean = float(cosines.double().mean())
            finite = finite and math.isfinite(mean)
            if finite and position < len(self.mine):
                total += round(mean * _UNIT)
            sample.hidden = output
        if self.world.any_rank(not finite):
            raise UserError(
                f"calibration produced infinite or NaN hidden states in block {number}; set "
                "base.compute_dtype to bfloat16 or float32"
            )
        self.world.all_reduce_sum(total)
        self.influence.append(1 - int(total) / _UNIT / self.count)
        log.info("block %d has influence %.4f", number, self.influence[-1])
