"""Gradients of several adapters by one forward and backward over their common base.

Micro-batch ``i`` of all adapters is one batch, whose rows the layers distinguish (``RowShares``)::

    adapter 0   rows 0 .. b-1      loss_0 = sum over its targets / targets of its step
    adapter 1   rows b .. 2b-1     loss_1 = ...                        backward(loss_0 + loss_1 ...)

Each loss depends on its own adapter's parameters alone, so the gradient of the sum is that of each
run alone, up to the rounding of larger products. A loss that is not finite makes NaN of its own
rows' gradients, and of no others.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dist_peft.adapters.joined.row_shares import RowShares
from dist_peft.adapters.protocol import Adapter
from dist_peft.core.progress_beat import mark_progress, start_step_phase
from dist_peft.core.world import World
from dist_peft.data.joined_batches import join_batches
from dist_peft.data.loader import Batch
from dist_peft.engine import Engine
from dist_peft.quant.fixed_point import SplitSum
from dist_peft.train.loop import count_penalty_parts
from dist_peft.train.objective import TokenObjective

__all__ = ["AdapterWork", "JoinedLosses", "JoinedStep"]


class AdapterWork(NamedTuple):
    """A step of one adapter.

    Attributes:
        step: steps that it has done before.
        batches: this rank's micro-batches; equally many on every rank.
        targets: of the step, over all ranks.
    """

    step: int
    batches: Sequence[Batch]
    targets: int


class JoinedLosses(NamedTuple):
    """Losses of one adapter's step: the mean over its targets, the same on every rank, and the
    summed losses of this rank's micro-batches."""

    mean: float
    losses: list[Tensor]


@dataclass(frozen=True)
class JoinedStep:
    """Everything that computes the gradients of a step.

    Attributes:
        model: with all adapters.
        adapters: by number.
        shares: of the model's layers.
        enter_pass: of some adapters, by their numbers: gives the module to call; None: the model.
        micro_batches: as of ``TrainingStep``.
    """

    model: nn.Module
    engine: Engine
    objective: TokenObjective
    world: World
    adapters: Sequence[Adapter]
    shares: RowShares
    enter_pass: Callable[[Sequence[int]], AbstractContextManager[nn.Module]] | None = None
    micro_batches: int | None = None

    def can_join(self, works: Mapping[int, AdapterWork]) -> bool:
        """Return whether ``accumulate_gradients`` takes these works."""
        return True

    def accumulate_gradients(self, works: Mapping[int, AdapterWork]) -> dict[int, JoinedLosses]:
        """Run forward and backward of all micro-batches; gradients are summed over ranks.

        Args:
            works: by number of the adapter; at least one. An adapter with fewer micro-batches than
                others is left out of the last passes.

        Returns:
            The losses, by number of the adapter.
        """
        most = max(len(work.batches) for work in works.values())
        start_step_phase(max(work.step for work in works.values()) + 1, "forward and backward")
        losses: dict[int, list[Tensor]] = {number: [] for number in works}
        for index in range(most):
            mark_progress()
            active = {k: work for k, work in works.items() if index < len(work.batches)}
            found = self._compute_losses(active, index)
            parts = []
            for (number, work), loss in zip(active.items(), found, strict=True):
                losses[number].append(loss.detach())
                # a target with logit -inf has an infinite loss and a finite gradient
                factor = torch.where(loss.detach().isfinite(), 1.0, math.nan)
                parts.append(loss * factor / max(1, work.targets))
                batch, own = work.batches[index], len(work.batches)
                share = count_penalty_parts(batch, own, self.world, self.micro_batches)
                self.adapters[number].add_penalty_gradient(parts[-1], share)
            self.engine.backward(torch.stack(parts).sum(), last=index == most - 1)
        return self._sum_over_ranks(works, losses)

    def compute_statistics(self, batches: Mapping[int, Batch]) -> dict[int, Tensor]:
        """Return ``compute_row_statistics`` of a held-out batch of each adapter, by one forward."""
        joined, counts = self._share_batch(batches)
        found = self.objective.compute_row_statistics(self.model, joined, self.engine.device)
        return dict(zip(batches, found.split(counts), strict=True))

    def _share_batch(self, batches: Mapping[int, Batch]) -> tuple[Batch, list[int]]:
        """Return the sequences of all adapters as one batch and their numbers, and let the layers
        know whose they are."""
        joined = join_batches(list(batches.values()))
        counts = [len(batch.sample_ids) for batch in batches.values()]
        shares = list(zip(batches, counts, strict=True))
        self.shares.split_batch(shares, joined.input_ids.shape[1])
        return joined, counts

    def _compute_losses(self, active: Mapping[int, AdapterWork], index: int) -> list[Tensor]:
        """Return the summed loss of micro-batch ``index`` of each adapter, by one forward."""
        own = {number: work.batches[index] for number, work in active.items()}
        for number, batch in own.items():
            self.adapters[number].begin_micro_batch(active[number].step, batch.sample_ids)
        joined, counts = self._share_batch(own)
        device, enter = self.engine.device, self.enter_pass
        with nullcontext(self.model) if enter is None else enter(list(active)) as call:
            return self.objective.compute_share_losses(self.model, joined, device, call, counts)

    def _sum_over_ranks(
        self, works: Mapping[int, AdapterWork], losses: Mapping[int, list[Tensor]]
    ) -> dict[int, JoinedLosses]:
        summed = SplitSum(len(works))
        for slot, number in enumerate(works):
            values = torch.stack(losses[number])
            summed.add_rows(values[:, None], torch.full((len(values),), slot))
        self.world.all_reduce_sum(summed.integers)
        wholes = zip(works.items(), summed.to_floats(), strict=True)
        return {
            number: JoinedLosses(whole / max(1, work.targets), losses[number])
            for (number, work), whole in wholes
        }
