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

Memory holds the packed shards, the samples' hidden states, one linear's rows, and one Hessian.
Base weights are unsharded only as packed bytes, a block at a time, as in training.
"""

import logging
import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from dist_peft.app.data_setup import check_tokens, read_rows
from dist_peft.app.model_setup import Built
from dist_peft.compress.calibration import Sample, capture, find_stages, watch_input
from dist_peft.core.config.run import RunConfig
from dist_peft.core.errors import UserError
from dist_peft.core.host_memory import freed_memory_is_returned
from dist_peft.core.log import ONCE
from dist_peft.core.world import World
from dist_peft.model.frozen_linear import FrozenLinear
from dist_peft.quant.affine import AffineCodec
from dist_peft.quant.gptq import Factor, Hessian, factorize, gram, largest_entry, solve_rows
from dist_peft.store.reader import RowReader

__all__ = ["Stopped", "calibration_windows", "solve"]

log = logging.getLogger("dist_peft")


class Stopped(Exception):
    """Calibration was stopped by a signal before its end; no result is kept."""


def calibration_windows(config: RunConfig, built: Built, world: World) -> Tensor:
    """Return token sequences of ``data.train``: long ``[samples, tokens]``, equal on every rank.

    Records are concatenated in an order drawn from ``train.seed`` and cut into full sequences.

    Raises:
        UserError: on every rank: unreadable data, or less than one sequence of text.
    """
    quant, data = config.base.quant, config.data
    assert quant is not None
    each = data.model_copy(update={"packing": False, "too_long": "truncate"})
    rows = read_rows(each, each.train, "train", built.tokenizer, world)
    check_tokens("data.train", rows, built.skeleton)
    base = built.skeleton.index.fingerprint()
    inputs = {"contents of base.path": base, "contents of data.train": rows.fingerprint}
    world.agree("calibration data", inputs)
    tokens = min(quant.calibration_tokens, built.skeleton.positions or quant.calibration_tokens)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(config.train.seed))
    parts: list[Tensor] = []
    missing = quant.calibration_samples * tokens
    for index in order.tolist():
        if missing <= 0:
            break
        parts.append(rows.row(index)[0])
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
def solve(
    built: Built, windows: Tensor, world: World, stop: Callable[[], bool] = lambda: False
) -> None:
    """Replace the codes of every linear in the blocks, in place, in each rank's shard.

    Args:
        built: a loaded model without adapter, before its optimizer is set up.
        windows: calibration tokens ``[samples, tokens]``, equal on every rank.
        stop: polled after each sample of the first forward and before each stage; true on one rank
            stops all.

    Raises:
        Stopped: ``stop`` returned true.
        UserError: on every rank: non-finite activations or a Hessian that cannot be factored.
    """
    with RowReader(built.skeleton.index) as reader, freed_memory_is_returned():
        _Solver(built, windows, world, reader, stop).run()


class _Solver:
    """Pass calibration samples through the blocks and quantize each block's linears."""

    def __init__(
        self,
        built: Built,
        windows: Tensor,
        world: World,
        reader: RowReader,
        stop: Callable[[], bool],
    ) -> None:
        self.built, self.world, self.reader, self.stop = built, world, reader, stop
        self.blocks, self.device = built.skeleton.blocks, built.engine.device
        self.count = len(windows)
        self.samples: list[Sample] = []
        # blocks contain collectives, so all ranks run them equally often; surplus runs of sample 0
        # are left out of the Hessian
        self.mine = range(world.rank, self.count, world.size)
        for number in range(-(-self.count // world.size)):
            index = self.mine[number] if number < len(self.mine) else 0
            ids = windows[index : index + 1].to(self.device)
            like = self.samples[0] if self.samples else None
            self.samples.append(capture(built.model, self.blocks, ids, like))
            self._stop_if_asked()
        self.stages_done = 0

    def run(self) -> None:
        log.info(
            "gptq: %d calibration sequences of %d tokens, %d blocks",
            self.count,
            self.samples[0].hidden.shape[1],
            len(self.blocks),
        )
        for number, block in enumerate(self.blocks):
            for stage in find_stages(block, partial(self.samples[0].run, block, number)):
                self._stop_if_asked()
                factor = self._factor(block, number, stage[0])
                for linear in stage:
                    self._refill(linear, factor)
            for sample in self.samples:
                sample.hidden = sample.run(block, number)
            log.info("gptq: block %d of %d", number + 1, len(self.blocks))

    def _stop_if_asked(self) -> None:
        (stopping,) = self.world.max(self.stop())
        if stopping:
            raise Stopped

    def _factor(self, block: nn.Module, number: int, linear: FrozenLinear) -> Factor:
        """Factor the Hessian of the inputs of ``linear`` on one rank and broadcast the factor."""
        hessian = self._hessian(block, number, linear)
        size = _codec(linear).group_size
        factor: Factor | None = None
        owner = self.stages_done % self.world.size
        self.stages_done += 1
        with self.world.together(f"factor the Hessian of {linear.source}"):
            if self.world.rank == owner:
                try:
                    factor = factorize(hessian.value(), size)
                except ValueError as error:
                    raise UserError(
                        f"tensor {linear.source}: {error}; raise base.quant.calibration_samples "
                        "or use base.quant.solver: hqq"
                    ) from None
        if factor is None:
            factor = Factor.empty(-(-linear.in_features // size) * size, self.device)
        self.world.broadcast(factor.order, owner)
        self.world.broadcast(factor.upper, owner)
        return factor

    def _hessian(self, block: nn.Module, number: int, linear: FrozenLinear) -> Hessian:
        """Return the Hessian of the inputs of ``linear``, summed over the samples of all ranks."""
        hessian = self._local_sum(block, number, linear, None)
        (most,) = self.world.max(hessian.largest)
        if math.isinf(most):
            raise UserError(
                f"calibration produced infinite or NaN inputs for {linear.source}; set "
                "base.compute_dtype to bfloat16 or float32"
            )
        if most > hessian.limit:
            hessian = self._local_sum(block, number, linear, most)
        self.world.add_up(hessian.total)
        return hessian

    def _local_sum(
        self, block: nn.Module, number: int, linear: FrozenLinear, top: float | None
    ) -> Hessian:
        """Sum the Gram matrices of this rank's samples as integers.

        Args:
            top: largest entry, which sets the unit of the integers; None: that of sample 0.
        """
        hessian: Hessian | None = None
        with watch_input(linear) as inputs:
            for position, sample in enumerate(self.samples):
                sample.run(block, number)
                own = gram(torch.cat([x.reshape(-1, x.shape[-1]) for x in inputs]))
                inputs.clear()
                if top is None:
                    (top,) = self.world.max(largest_entry(own) if self.world.is_first else 0.0)
                if hessian is None:
                    hessian = Hessian(linear.in_features, top, self.count, self.device)
                if position < len(self.mine):
                    hessian.add(own)
        assert hessian is not None
        return hessian

    def _refill(self, linear: FrozenLinear, factor: Factor) -> None:
        engine = self.built.engine
        span = engine.span(linear.packed)
        packed = torch.empty(0)
        with self.world.together(f"quantize {linear.source}"):
            rows = self.reader.read(linear.source, span).to(self.device)
            try:
                packed = solve_rows(rows, factor, _codec(linear))
            except ValueError as error:
                raise UserError(f"tensor {linear.source}: {error}") from None
        engine.fill(linear, "packed", packed)


def _codec(linear: FrozenLinear) -> AffineCodec:
    assert isinstance(linear.codec, AffineCodec)
    return linear.codec
