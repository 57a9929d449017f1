"""Prune the linears of a sharded model: by magnitude, with Wanda, with SparseGPT.

``quant.sparsity`` and ``quant.sparsegpt`` have the mathematics. Each rank reads its own rows of a
linear in the files' type, prunes them, and puts them into its shard. Magnitudes need no text. The
others go through the blocks (``block_loop``), and in each block through its stages (linears of one
input)::

    wanda        sums of squares of the inputs' columns, added up over ranks as integers
    sparsegpt    the Hessian, added up the same way; one rank factors it, all ranks receive it

As in the authors' code, all linears of a block are pruned on the inputs that they have while the
block is dense, and the next block sees the outputs of this pruned one.

Memory holds what GPTQ's loop holds (without the factor for Wanda), and this rank's pruned rows of
one block.
"""

from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dist_peft.compress.block_loop import BlockLoop, raise_if_any_stopped
from dist_peft.compress.calibration import find_linear_stages
from dist_peft.compress.solved_blocks import SolvedBlocks
from dist_peft.core.errors import UserError
from dist_peft.core.host_memory import return_freed_memory
from dist_peft.core.progress_beat import SETUP_PATIENCE, enter_phase, mark_progress
from dist_peft.core.world import World
from dist_peft.engine import Engine
from dist_peft.model.frozen_linear import FrozenLinear, WeightRows
from dist_peft.model.skeleton import Skeleton
from dist_peft.quant.codec import RawCodec
from dist_peft.quant.sparsegpt import PruningFactor, factorize_for_pruning, prune_weight_rows
from dist_peft.quant.sparsity import (
    Sparsity,
    select_by_threshold,
    select_in_groups,
    select_in_rows,
)
from dist_peft.store.reader import RowReader

__all__ = [
    "NO_CALIBRATION_ADVICE",
    "check_sparsity_fits",
    "list_pruned_linears",
    "prune_by_calibration",
    "prune_by_magnitude",
    "store_in_file_dtypes",
]

NO_CALIBRATION_ADVICE = "use --method magnitude, which needs no calibration"

RowPruner = Callable[[Tensor, int], Tensor]
"""Maps this rank's rows of a linear, float32 ``[n, in]``, and the number of all rows to the pruned
rows, float32 ``[n, in]``."""


def list_pruned_linears(module: nn.Module) -> list[FrozenLinear]:
    """Return the linears that are pruned: those of the blocks that are stored packed."""
    linears = (m for m in module.modules() if isinstance(m, FrozenLinear))
    return [linear for linear in linears if not linear.is_head]


def check_sparsity_fits(skeleton: Skeleton, sparsity: Sparsity) -> None:
    """Check that each linear can have this sparsity.

    Raises:
        UserError: groups do not divide a row, less than one weight is pruned, or there is no
            linear.
    """
    linears = list_pruned_linears(skeleton.model)
    if not linears:
        raise UserError(
            f"{skeleton.index.path} has no linear that could be pruned; use --method blocks"
        )
    for linear in linears:
        if sparsity.group and linear.in_features % sparsity.group:
            raise UserError(
                f"--sparsity {sparsity} prunes groups of {sparsity.group} weights, which do not "
                f"divide the {linear.in_features} columns of {linear.source}; use another pattern "
                "or a share such as 0.5"
            )
        if not sparsity.count_pruned(linear.in_features):
            raise UserError(
                f"--sparsity {sparsity} is less than one weight of the {linear.in_features} in a "
                f"row of {linear.source}; use a larger share"
            )


def store_in_file_dtypes(skeleton: Skeleton) -> None:
    """Let linears keep their rows in the files' type instead of the compute type.

    Called before the model is sharded. The output then has no rounding of its own.
    """
    for linear in list_pruned_linears(skeleton.model):
        codec = RawCodec(skeleton.index.find_tensor(linear.source).dtype)
        shape = (linear.out_features, codec.num_row_bytes(linear.in_features))
        empty = torch.empty(shape, dtype=torch.uint8, device="meta")
        linear.codec, linear.packed = codec, nn.Parameter(empty, requires_grad=False)


@torch.no_grad()
def prune_by_magnitude(
    skeleton: Skeleton,
    engine: Engine,
    sparsity: Sparsity,
    world: World,
    stop: Callable[[], bool] = lambda: False,
) -> None:
    """Prune the smallest weights of each linear, in each rank's shard.

    Args:
        skeleton: a model without adapter, its weights loaded and sharded by ``engine``.
        stop: polled before each linear; true on one rank stops all.

    Raises:
        StopRequested: ``stop`` returned true.
    """
    prune = partial(_prune_small_weights, sparsity=sparsity, engine=engine)
    patience = enter_phase("pruning", SETUP_PATIENCE)
    with RowReader(skeleton.index) as reader, return_freed_memory(), patience:
        for linear in list_pruned_linears(skeleton.model):
            raise_if_any_stopped(world, stop)
            packed = _prune_local_rows(linear, engine, world, reader, prune)
            engine.fill_local_rows(linear, "packed", packed)


@torch.no_grad()
def prune_by_calibration(
    criterion: str,
    skeleton: Skeleton,
    engine: Engine,
    sparsity: Sparsity,
    windows: Tensor,
    world: World,
    stop: Callable[[], bool] = lambda: False,
    solved: SolvedBlocks | None = None,
) -> None:
    """Prune every linear of the blocks with Wanda or SparseGPT, in each rank's shard.

    Args:
        criterion: ``wanda`` or ``sparsegpt``.
        skeleton: a model without adapter, its weights loaded and sharded by ``engine``.
        windows: calibration tokens ``[samples, tokens]``, equal on every rank.
        stop: polled after each sample of the first forward and before each stage; true on one rank
            stops all.
        solved: keeps each block once it is pruned, and has those of a call that was stopped.

    Raises:
        StopRequested: ``stop`` returned true.
        UserError: on every rank: non-finite activations or a Hessian that cannot be factored.
    """
    pruner = {"wanda": _WandaPruner, "sparsegpt": _SparseGptPruner}[criterion]
    patience = enter_phase("pruning", 2 * SETUP_PATIENCE)  # for one matrix, not for all of them
    with RowReader(skeleton.index) as reader, return_freed_memory(), patience:
        loop = pruner(skeleton, engine, windows, world, reader, stop)
        loop.sparsity = sparsity
        loop.solve_all_blocks(solved)


def _prune_local_rows(
    linear: FrozenLinear, engine: Engine, world: World, reader: RowReader, prune: RowPruner
) -> Tensor:
    """Read this rank's rows of ``linear`` and return them pruned and packed."""
    span = engine.local_row_span(linear.packed)
    with world.raise_together(f"read {linear.source}"):
        read = WeightRows.read_weight_rows(linear, reader, span, engine.device).to_float()
    rows = prune(read, linear.out_features)
    packed = torch.empty(0)
    with world.raise_together(f"prune {linear.source}"):
        packed = WeightRows(linear, rows).to_packed()
    mark_progress()
    return packed


def _prune_small_weights(
    rows: Tensor, total_rows: int, *, sparsity: Sparsity, engine: Engine
) -> Tensor:
    scores = rows.abs()
    if sparsity.group:
        return rows.masked_fill(select_in_groups(scores, sparsity), 0)
    count = sparsity.count_pruned(total_rows * rows.shape[1])
    return rows.masked_fill(select_by_threshold(scores, count, engine.sum_over_shards), 0)


class _CalibratedPruner(BlockLoop):
    """Prune the linears of each block on the inputs that they have in the dense block."""

    advice = NO_CALIBRATION_ADVICE
    factor_advice = f"raise --calibration-samples, or {NO_CALIBRATION_ADVICE}"
    sparsity: Sparsity

    def _solve_block(self, number: int, block: nn.Module) -> None:
        pruned: list[tuple[FrozenLinear, Tensor]] = []
        run: Callable[[], Any] = partial(self.samples[0].run_block, block, number)
        for stage in find_linear_stages(block, run, self.advice):
            self._raise_if_stopped()
            prune = self._prepare_stage(block, number, stage[0])
            for linear in stage:
                packed = _prune_local_rows(linear, self.engine, self.world, self.reader, prune)
                pruned.append((linear, packed))
        for linear, packed in pruned:
            self.engine.fill_local_rows(linear, "packed", packed)

    @abstractmethod
    def _prepare_stage(self, block: nn.Module, number: int, linear: FrozenLinear) -> RowPruner:
        """Return the pruner of the linears that have the inputs of ``linear``; a collective."""


class _WandaPruner(_CalibratedPruner):
    label = "wanda"

    def _prepare_stage(self, block: nn.Module, number: int, linear: FrozenLinear) -> RowPruner:
        sums = self._compute_hessian(block, number, linear, diagonal=True)
        norms = sums.mean_hessian().sqrt().float()

        def prune_rows(rows: Tensor, total_rows: int) -> Tensor:
            scores = rows.abs() * norms
            if self.sparsity.group:
                return rows.masked_fill(select_in_groups(scores, self.sparsity), 0)
            count = self.sparsity.count_pruned(rows.shape[1])
            return rows.masked_fill(select_in_rows(scores, count), 0)

        return prune_rows


class _SparseGptPruner(_CalibratedPruner):
    label = "sparsegpt"

    def _prepare_stage(self, block: nn.Module, number: int, linear: FrozenLinear) -> RowPruner:
        factor = self._broadcast_factor(block, number, linear)

        def prune_rows(rows: Tensor, total_rows: int) -> Tensor:
            reduce = self.engine.sum_over_shards
            return prune_weight_rows(rows, factor, self.sparsity, total_rows, reduce)

        return prune_rows

    def _broadcast_factor(
        self, block: nn.Module, number: int, linear: FrozenLinear
    ) -> PruningFactor:
        hessian = self._compute_hessian(block, number, linear)
        factor, owner = self._factorize_on_one_rank(
            linear, lambda: factorize_for_pruning(hessian.mean_hessian())
        )
        if factor is None:
            factor = PruningFactor.allocate_empty(linear.in_features, self.device)
        self.world.broadcast_tensor(factor.upper, owner)
        self.world.broadcast_tensor(factor.diagonal, owner)
        return factor
