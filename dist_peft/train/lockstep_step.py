"""Gradients of several adapters, each with the bits of its run alone, by one gather of the base.

Batches are not joined (``train.exact``): products of other shapes round otherwise. Each adapter
computes its own micro-batch with its own operators, but unit by unit together with the others
(``model.lockstep``), so that a block is gathered once for all of them in forward and once in
backward. The losses have one backward, each with a gradient of exactly 1.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor, nn

from dist_peft.data.loader import Batch
from dist_peft.model.lockstep import Lockstep
from dist_peft.train.joined_step import AdapterWork, JoinedStep

__all__ = ["LockstepStep"]


def _no_models(number: int) -> tuple[nn.Module, nn.Module]:
    raise AssertionError("get_models is given")


@dataclass(frozen=True)
class LockstepStep(JoinedStep):
    """A step whose adapters pass through the model in lockstep.

    Attributes:
        units: modules that the engine gathers as units.
        get_models: of an adapter, by its number: its model, and the engine's wrapper of it or
            itself, which is called in training.
    """

    units: tuple[nn.Module, ...] = ()
    get_models: Callable[[int], tuple[nn.Module, nn.Module]] = field(default=_no_models)

    def can_join(self, works: Mapping[int, AdapterWork]) -> bool:
        """Return whether integers are summed over equally many micro-batches of each adapter."""
        return len({len(work.batches) for work in works.values()}) == 1

    def compute_statistics(self, batches: Mapping[int, Batch]) -> dict[int, Tensor]:
        """Return ``compute_row_statistics`` of a held-out batch of each adapter."""
        compute, device = self.objective.compute_row_statistics, self.engine.device
        return self._lockstep.run(
            {k: partial(compute, self.get_models(k)[0], own, device) for k, own in batches.items()}
        )

    def _compute_losses(self, active: Mapping[int, AdapterWork], index: int) -> list[Tensor]:
        calls = {}
        for number, work in active.items():
            batch, (model, call) = work.batches[index], self.get_models(number)
            self.adapters[number].begin_micro_batch(work.step, batch.sample_ids)
            calls[number] = partial(
                self.objective.compute_loss, model, batch, self.engine.device, call
            )
        return list(self._lockstep.run(calls).values())

    @property
    def _lockstep(self) -> Lockstep:
        return Lockstep(self.model, self.units, self.shares.give_all)
