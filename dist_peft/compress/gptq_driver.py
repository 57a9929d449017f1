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

import logging
import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from dist_peft.compress.calibration import (
    CalibrationSample,
    capture_block_inputs,
    find_linear_stages,
    record_inputs,
)
from dist_peft.compress.solved_blocks import SolvedBlocks
from dist_peft.core.config.run import QuantConfig
from dist_peft.core.errors import UserError
from dist_peft.core.host_memory import return_freed_memory
from dist_peft.core.log import ONCE
from dist_peft.core.progress_beat import SETUP_PATIENCE, enter_phase
from dist_peft.core.stop_signals import StopRequested
from dist_peft.core.world import World
from dist_peft.data.documents import SequenceSet
from dist_peft.engine import Engine
from dist_peft.model.frozen_linear import FrozenLinear
from dist_peft.model.skeleton import Skeleton
from dist_peft.quant.affine import AffineCodec
from dist_peft.quant.gptq import (
    HessianFactor,
    HessianSum,
    compute_gram,
    factorize_hessian,
    find_largest_entry,
    solve_weight_rows,
)
from dist_peft.store.reader import RowReader

__all__ = ["make_calibration_sequences", "solve_gptq_codes"]

log = logging.getLogger("dist_peft")


def make_calibration_sequences(
    documents: SequenceSet, quant: QuantConfig, *, max_positions: int | None, seed: int
) -> Tensor:
    """Return token sequences of ``data.train``: long ``[samples, tokens]``.

    Documents are concatenated in an order drawn from ``seed`` and cut into full sequences.

    Args:
        documents: the calibration text, unpacked.
        quant: sets the number of sequences and of their tokens.
        max_positions: longest sequence that the base supports; None: no limit.

    Raises:
        UserError: less than one sequence of text.
    """
    tokens = min(quant.calibration_tokens, max_positions or quant.calibration_tokens)
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed))
    parts: list[Tensor] = []
    missing = quant.calibration_samples * tokens
    for index in order.tolist():
        if missing <= 0:
            break
        parts.append(documents.get_sequence(index)[0])
        missing -= len(parts[-1])
    text = torch.cat(parts)
    count = min(len(text) // tokens, quant.calibration_samples)
    if not count:
        raise UserError(
            f"data.train has {len(text)} tokens, less than a calibration sequence of {tokens}; "
            "add text or lower base.quant.calibration_tokens"
        )
    if count < quant.calibration_samples:
        log.warning(
            "data.train has text for %d calibration sequences of %d tokens, not for %d "
            "(base.quant.calibration_samples)",
            count,
            tokens,
            quant.calibration_samples,
            extra=ONCE,
        )
    return text[: count * tokens].long().view(count, tokens)


@torch.no_grad()
def solve_gptq_codes(
    skeleton: Skeleton,
    engine: Engine,
    windows: Tensor,
    world: World,
    stop: Callable[[], bool] = lambda: False,
    solved: SolvedBlocks | None = None,
) -> None:
    """Replace the codes of every linear in the blocks, in place, in each rank's shard.

    Args:
        skeleton: a model without adapter, its weights loaded and sharded by ``engine``.
        engine: before its optimizer is set up.
        windows: calibration tokens ``[samples, tokens]``, equal on every rank.
        stop: polled after each sample of the first forward and before each stage; true on one rank
            stops all.
        solved: keeps each block once it is solved, and has those of a solve that was stopped.

    Raises:
        StopRequested: ``stop`` returned true.
        UserError: on every rank: non-finite activations or a Hessian that cannot be factored.
    """
    patience = enter_phase("GPTQ", 2 * SETUP_PATIENCE)  # for one matrix, not for all of them
    with RowReader(skeleton.index) as reader, return_freed_memory(), patience:
        _GptqSolver(skeleton, engine, windows, world, reader, stop).solve_all_blocks(solved)


class _GptqSolver:
    """Pass calibration samples through the blocks and quantize each block's linears."""

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
        # are left out of the Hessian
        self.mine = range(world.data_rank, self.count, world.data_size)
        for number in range(-(-self.count // world.data_size)):
            index = self.mine[number] if number < len(self.mine) else 0
            ids = windows[index : index + 1].to(self.device)
            like = self.samples[0] if self.samples else None
            self.samples.append(capture_block_inputs(skeleton.model, self.blocks, ids, like))
            self._raise_if_stopped()
        self.stages_done = 0

    def solve_all_blocks(self, solved: SolvedBlocks | None = None) -> None:
        log.info(
            "gptq: %d calibration sequences of %d tokens, %d blocks",
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
                    log.info("gptq: %d blocks were solved before", number)
            if not restoring:
                self._solve_block(number, block)
                if solved is not None:
                    solved.save_block(number, block, self.engine)
            for sample in self.samples:
                sample.hidden = sample.run_block(block, number)
            log.info("gptq: block %d of %d", number + 1, len(self.blocks))

    def _solve_block(self, number: int, block: nn.Module) -> None:
        for stage in find_linear_stages(block, partial(self.samples[0].run_block, block, number)):
            self._raise_if_stopped()
            factor = self._broadcast_factor(block, number, stage[0])
            for linear in stage:
                self._replace_codes(linear, factor)

    def _raise_if_stopped(self) -> None:
        (stopping,) = self.world.max_over_ranks(self.stop())
        if stopping:
            raise StopRequested

    def _broadcast_factor(
        self, block: nn.Module, number: int, linear: FrozenLinear
    ) -> HessianFactor:
        """Factor the Hessian of the inputs of ``linear`` on one rank and broadcast the factor."""
        hessian = self._compute_hessian(block, number, linear)
        size = _get_affine_codec(linear).group_size
        factor: HessianFactor | None = None
        owner = self.stages_done % self.world.size
        self.stages_done += 1
        with self.world.raise_together(f"factor the Hessian of {linear.source}"):
            if self.world.rank == owner:
                try:
                    factor = factorize_hessian(hessian.mean_hessian(), size)
                except ValueError as error:
                    raise UserError(
                        f"tensor {linear.source}: {error}; raise base.quant.calibration_samples "
                        "or use base.quant.solver: hqq"
                    ) from None
        if factor is None:
            factor = HessianFactor.allocate_empty(
                -(-linear.in_features // size) * size, self.device
            )
        self.world.broadcast_tensor(factor.order, owner)
        self.world.broadcast_tensor(factor.upper, owner)
        return factor

    def _compute_hessian(self, block: nn.Module, number: int, linear: FrozenLinear) -> HessianSum:
        """Return the Hessian of the inputs of ``linear``, summed over the samples of all ranks."""
        hessian = self._accumulate_local_hessian(block, number, linear, None)
        (most,) = self.world.max_over_ranks(hessian.largest)
        if math.isinf(most):
            raise UserError(
                f"calibration produced infinite or NaN inputs for {linear.source}; set "
                "base.compute_dtype to bfloat16 or float32"
            )
        if most > hessian.limit:
            hessian = self._accumulate_local_hessian(block, number, linear, most)
        self.world.all_reduce_sum(hessian.total)
        return hessian

    def _accumulate_local_hessian(
        self, block: nn.Module, number: int, linear: FrozenLinear, top: float | None
    ) -> HessianSum:
        """Sum the Gram matrices of this rank's samples as integers.

        Args:
            top: largest entry, which sets the unit of the integers; None: that of sample 0.
        """
        hessian: HessianSum | None = None
        with record_inputs(linear) as inputs:
            for position, sample in enumerate(self.samples):
                sample.run_block(block, number)
                own = compute_gram(torch.cat([x.reshape(-1, x.shape[-1]) for x in inputs]))
                inputs.clear()
                if top is None:
                    (top,) = self.world.max_over_ranks(
                        find_largest_entry(own) if self.world.is_first else 0.0
                    )
                if hessian is None:
                    hessian = HessianSum(linear.in_features, top, self.count, self.device)
                if position < len(self.mine):
                    hessian.add_sample(own)
        assert hessian is not None
        return hessian

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
