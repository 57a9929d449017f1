"""Loop over the blocks of a sharded model with calibration samples, for GPTQ and pruning.

Each rank has its share of the samples. They stand at the input of a block; the block is changed,
then run once more on every sample, so that the next block is changed on the inputs that it will
have::

    every rank     runs its calibration samples through the block, one at a time, and accumulates
                   their Gram matrices as integers
    all ranks      all-reduce the sums: exact, so equal for any number of ranks
    every rank     changes its own rows of the block's linears
    every rank     runs the changed block for the inputs of the next one

A finished block is kept on disk (``solved_blocks``): a loop that was stopped fills the blocks
before from there and runs only their forwards, with the same result.
"""

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn

from dist_peft.compress.calibration import CalibrationSample, capture_block_inputs, record_inputs
from dist_peft.compress.solved_blocks import SolvedBlocks
from dist_peft.core.errors import UserError
from dist_peft.core.stop_signals import StopRequested
from dist_peft.core.world import World
from dist_peft.engine import Engine
from dist_peft.model.frozen_linear import FrozenLinear
from dist_peft.model.skeleton import Skeleton
from dist_peft.quant.gptq import (
    HessianSum,
    compute_gram,
    compute_square_sums,
    find_largest_entry,
)
from dist_peft.store.reader import RowReader

__all__ = ["BlockLoop", "raise_if_any_stopped"]

log = logging.getLogger("dist_peft")

Factor = TypeVar("Factor")


def raise_if_any_stopped(world: World, stop: Callable[[], bool]) -> None:
    """Raise on every rank where ``stop`` returns true on one; a collective.

    Raises:
        StopRequested: it did.
    """
    (stopping,) = world.max_over_ranks(stop())
    if stopping:
        raise StopRequested


class BlockLoop(ABC):
    """Pass calibration samples through the blocks, and change each block before its last pass.

    Args:
        skeleton: a model without adapter, its weights loaded and sharded by ``engine``.
        engine: before its optimizer is set up.
        windows: calibration tokens ``[samples, tokens]``, equal on every rank.
        reader: of the base's files.
        stop: polled after each sample of the first forward and before each block.
    """

    label: ClassVar[str]
    """Name of the method in the log."""
    advice: ClassVar[str]
    """Fix for a model that calibration cannot run, for messages."""
    factor_advice: ClassVar[str] = ""
    """Fix for a Hessian that cannot be factored."""

    def __init__(
        self,
        skeleton: Skeleton,
        engine: Engine,
        windows: Tensor,
        world: World,
        reader: RowReader,
        stop: Callable[[], bool],
    ) -> None:
        self.engine, self.world, self.reader, self.stop = engine, world, reader, stop
        self.blocks, self.device = skeleton.blocks, engine.device
        self.count = len(windows)
        self.samples: list[CalibrationSample] = []
        # blocks contain collectives, so all ranks run them equally often; surplus runs of sample 0
        # are left out of the sums
        self.mine = range(world.data_rank, self.count, world.data_size)
        for number in range(-(-self.count // world.data_size)):
            index = self.mine[number] if number < len(self.mine) else 0
            ids = windows[index : index + 1].to(self.device)
            like = self.samples[0] if self.samples else None
            self.samples.append(
                capture_block_inputs(skeleton.model, self.blocks, ids, like, self.advice)
            )
            self._raise_if_stopped()
        self._stages_done = 0

    def solve_all_blocks(self, solved: SolvedBlocks | None = None) -> None:
        """Change every block, in order.

        Args:
            solved: keeps each block once it is changed, and has those of a loop that was stopped.
        """
        log.info(
            "%s: %d calibration sequences of %d tokens, %d blocks",
            self.label,
            self.count,
            self.samples[0].hidden.shape[1],
            len(self.blocks),
        )
        restoring = solved is not None
        for number, block in enumerate(self.blocks):
            self._raise_if_stopped()
            if solved is not None and restoring:
                restoring = solved.restore_block(number, block, self.engine)
                if not restoring and number:
                    log.info("%s: %d blocks were solved before", self.label, number)
            if not restoring:
                self._solve_block(number, block)
                if solved is not None:
                    solved.save_block(number, block, self.engine)
            self._finish_block(number, block)
            log.info("%s: block %d of %d", self.label, number + 1, len(self.blocks))

    @abstractmethod
    def _solve_block(self, number: int, block: nn.Module) -> None:
        """Change the linears of a block, in this rank's shard."""

    def _finish_block(self, number: int, block: nn.Module) -> None:
        for sample in self.samples:
            sample.hidden = sample.run_block(block, number)

    def _raise_if_stopped(self) -> None:
        raise_if_any_stopped(self.world, self.stop)

    def _compute_hessian(
        self, block: nn.Module, number: int, linear: FrozenLinear, *, diagonal: bool = False
    ) -> HessianSum:
        """Return the Hessian of the inputs of ``linear``, summed over the samples of all ranks.

        Args:
            diagonal: only the sums of squares of each column.

        Raises:
            UserError: on every rank: non-finite activations.
        """
        hessian = self._accumulate_local_hessian(block, number, linear, None, diagonal)
        (most,) = self.world.max_over_ranks(hessian.largest)
        if math.isinf(most):
            raise UserError(
                f"calibration produced infinite or NaN inputs for {linear.source}; set "
                "base.compute_dtype to bfloat16 or float32"
            )
        if most > hessian.limit:
            hessian = self._accumulate_local_hessian(block, number, linear, most, diagonal)
        self.world.all_reduce_sum(hessian.total)
        return hessian

    def _factorize_on_one_rank(
        self, linear: FrozenLinear, factorize: Callable[[], Factor]
    ) -> tuple[Factor | None, int]:
        """Call ``factorize`` on one rank, which takes turns; the caller broadcasts its result.

        Returns:
            The factor, None on the other ranks, and the rank that has it.

        Raises:
            UserError: on every rank: ``factorize`` raised ValueError.
        """
        factor: Factor | None = None
        owner = self._stages_done % self.world.size
        self._stages_done += 1
        with self.world.raise_together(f"factor the Hessian of {linear.source}"):
            if self.world.rank == owner:
                try:
                    factor = factorize()
                except ValueError as error:
                    raise UserError(
                        f"tensor {linear.source}: {error}; {self.factor_advice}"
                    ) from None
        return factor, owner

    def _accumulate_local_hessian(
        self,
        block: nn.Module,
        number: int,
        linear: FrozenLinear,
        top: float | None,
        diagonal: bool,
    ) -> HessianSum:
        """Sum the Gram matrices of this rank's samples as integers.

        Args:
            top: largest entry, which sets the unit of the integers; None: that of sample 0.
        """
        hessian: HessianSum | None = None
        compute_own = compute_square_sums if diagonal else compute_gram
        with record_inputs(linear) as inputs:
            for position, sample in enumerate(self.samples):
                sample.run_block(block, number)
                own = compute_own(torch.cat([x.reshape(-1, x.shape[-1]) for x in inputs]))
                inputs.clear()
                if top is None:
                    (top,) = self.world.max_over_ranks(
                        find_largest_entry(own) if self.world.is_first else 0.0
                    )
                if hessian is None:
                    hessian = HessianSum(
                        linear.in_features, top, self.count, self.device, diagonal=diagonal
                    )
                if position < len(self.mine):
                    hessian.add_sample(own)
        assert hessian is not None
        return hessian
