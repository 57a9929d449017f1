"""GPTQ over a sharded model, block by block (``quant.gptq`` has the mathematics).

The model is loaded as for training, rounded to nearest, each rank its own rows. Then, for each
block and each of its stages (linears of one input)::

    every rank     runs its calibration samples through the block, one at a time, and accumulates
                   their Gram matrices as integers
    all ranks      all-reduce the sums: exact, so equal for any number of ranks
    one rank       factors the Hessian and broadcasts the factor
    every rank     reads its own rows of the linear again, solves them, writes them to its shard

followed by a forward of the block for the inputs of the next one. A later stage sees the quantized
weights of earlier ones ("true sequential"), the next block the outputs of this quantized one.

A solved block is kept on disk (``solved_blocks``): a solve that was stopped fills the blocks before
from there and runs only their forwards, with the same result.

Memory holds the packed shards, the samples' hidden states, one linear's rows, and one Hessian.
Base weights are unsharded only as packed bytes, a block at a time, as in training.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from dist_peft.compress.block_loop import BlockLoop
from dist_peft.compress.calibration import find_linear_stages
from dist_peft.compress.solved_blocks import SolvedBlocks
from dist_peft.core.errors import UserError
from dist_peft.core.host_memory import return_freed_memory
from dist_peft.core.progress_beat import SETUP_PATIENCE, enter_phase
from dist_peft.core.world import World
from dist_peft.engine import Engine
from dist_peft.model.frozen_linear import FrozenLinear
from dist_peft.model.skeleton import Skeleton
from dist_peft.quant.affine import AffineCodec
from dist_peft.quant.gptq import HessianFactor, factorize_hessian, solve_weight_rows
from dist_peft.store.reader import RowReader

__all__ = ["KeepFactor", "solve_gptq_codes"]

KeepFactor = Callable[[Sequence[str], HessianFactor], None]
"""Takes the names of the weights that share an input, and the factor of its Hessian."""


@torch.no_grad()
def solve_gptq_codes(
    skeleton: Skeleton,
    engine: Engine,
    windows: Tensor,
    world: World,
    stop: Callable[[], bool] = lambda: False,
    solved: SolvedBlocks | None = None,
    keep: KeepFactor | None = None,
) -> None:
    """Replace the codes of every linear in the blocks, in place, in each rank's shard.

    Args:
        skeleton: a model without adapter, its weights loaded and sharded by ``engine``.
        engine: before its optimizer is set up.
        windows: calibration tokens ``[samples, tokens]``, equal on every rank.
        stop: polled after each sample of the first forward and before each stage; true on one rank
            stops all.
        solved: keeps each block once it is solved, and has those of a solve that was stopped.
        keep: of a rank that keeps factors; called with each that is made, not those of ``solved``.

    Raises:
        StopRequested: ``stop`` returned true.
        UserError: on every rank: non-finite activations or a Hessian that cannot be factored.
    """
    patience = enter_phase("GPTQ", 2 * SETUP_PATIENCE)  # for one matrix, not for all of them
    with RowReader(skeleton.index) as reader, return_freed_memory(), patience:
        solver = _GptqSolver(skeleton, engine, windows, world, reader, stop)
        solver.keep = keep
        solver.solve_all_blocks(solved)


class _GptqSolver(BlockLoop):
    """Pass calibration samples through the blocks and quantize each block's linears."""

    label = "gptq"
    advice = "use base.quant.solver: hqq, which needs no calibration"
    keep: KeepFactor | None = None
    factor_advice = "raise base.quant.calibration_samples or use base.quant.solver: hqq"

    def _solve_block(self, number: int, block: nn.Module) -> None:
        run = partial(self.samples[0].run_block, block, number)
        for stage in find_linear_stages(block, run, self.advice):
            self._raise_if_stopped()
            factor = self._broadcast_factor(block, number, stage[0])
            with self.world.raise_together("keep a factor of GPTQ"):
                if self.keep is not None:
                    self.keep([linear.source for linear in stage], factor)
            for linear in stage:
                self._replace_codes(linear, factor)

    def _broadcast_factor(
        self, block: nn.Module, number: int, linear: FrozenLinear
    ) -> HessianFactor:
        """Factor the Hessian of the inputs of ``linear`` on one rank and broadcast the factor."""
        hessian = self._compute_hessian(block, number, linear)
        size = _get_affine_codec(linear).group_size
        factor, owner = self._factorize_on_one_rank(
            linear, lambda: factorize_hessian(hessian.mean_hessian(), size)
        )
        if factor is None:
            factor = HessianFactor.allocate_empty(
                -(-linear.in_features // size) * size, self.device
            )
        self.world.broadcast_tensor(factor.order, owner)
        self.world.broadcast_tensor(factor.upper, owner)
        return factor

    def _replace_codes(self, linear: FrozenLinear, factor: HessianFactor) -> None:
        span = self.engine.local_row_span(linear.packed)
        packed = torch.empty(0)
        with self.world.raise_together(f"quantize {linear.source}"):
            rows = self.reader.read_rows(linear.source, span).to(self.device)
            try:
                packed = solve_weight_rows(rows, factor, _get_affine_codec(linear))
            except ValueError as error:
                raise UserError(f"tensor {linear.source}: {error}") from None
        self.engine.fill_local_rows(linear, "packed", packed)


def _get_affine_codec(linear: FrozenLinear) -> AffineCodec:
    rows = linear.codec.affine_rows
    assert rows is not None, linear.source  # solver gptq is for integers only
    return AffineCodec(rows.bits, rows.group_size)
