"""Sum a tensor for each of many linears over batches of training data, on all ranks.

Each rank runs its share of the micro-batches. The sums are exact (``quant.fixed_point``), so they
have the same bits at any number of ranks and on any engine. What is computed from a sum is computed
on one rank and sent to the others, since a decomposition on two machines may differ.

Sums of large linears do not fit into memory together: linears are taken in groups, in the order of
the model, and the batches are run once for each group.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_peft.core.errors import UserError
from dist_peft.core.progress_beat import mark_progress
from dist_peft.core.world import World
from dist_peft.data.loader import Batch
from dist_peft.quant.fixed_point import FixedPointSum

__all__ = ["BYTES_AT_ONCE", "CalibrationSums"]

BYTES_AT_ONCE = 2**32
"""Most memory of the sums of a group; a linear that needs more is a group of its own."""

_BYTES_PER_ENTRY = 24  # a batch's float64, the sum's int64, and one that is being added

Shape = tuple[int, int]
RunBatch = Callable[[Sequence[str], Batch], Mapping[str, Tensor]]
"""Runs the model and returns, for those of these names that it has reached, what is summed:
float64, of the shape of the name."""


@dataclass
class CalibrationSums:
    """Sums over ``batches`` of what ``run`` returns.

    Attributes:
        batches: this rank's micro-batches; equally many on every rank. The first one of rank 0 is
            the same at any number of ranks.
        samples: most micro-batches over all ranks, the same at any number of ranks.
        key: of the configuration, for messages.
    """

    world: World
    device: torch.device
    batches: Sequence[Batch]
    run: RunBatch
    samples: int
    key: str
    bytes_at_once: int = BYTES_AT_ONCE

    def map_sums(
        self,
        shapes: Mapping[str, Shape],
        sizes: Mapping[str, int],
        compute: Callable[[str, Tensor], Tensor],
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield each name with what ``compute`` returns for its sum; a collective.

        Args:
            shapes: name -> shape of its sum.
            sizes: name -> number of elements that ``compute`` returns.
            compute: maps a name and its sum, float64, to a flat float32 tensor; called on one rank.

        Raises:
            UserError: on every rank: values that are not finite, or ``compute`` raised ValueError.
        """
        for group in _split_into_groups(shapes, self.bytes_at_once // _BYTES_PER_ENTRY):
            sums = self._sum_group({name: shapes[name] for name in group})
            found: dict[str, Tensor] = {}
            with self.world.raise_together("initialize the adapter"):
                for number, name in enumerate(group):
                    if number % self.world.size == self.world.rank:
                        mark_progress()
                        found[name] = self._compute_one(name, sums[name], compute)
            for number, name in enumerate(group):
                empty = torch.empty(sizes[name], device=self.device)
                result = found.pop(name, empty).contiguous()
                assert result.shape == empty.shape and result.dtype == empty.dtype
                self.world.broadcast_tensor(result, number % self.world.size)
                yield name, result

    def _compute_one(
        self, name: str, total: FixedPointSum, compute: Callable[[str, Tensor], Tensor]
    ) -> Tensor:
        try:
            return compute(name, total.to_float())
        except ValueError as error:
            raise UserError(
                f"{self.key} in {name}: {error}; raise adapter.init_samples, or leave it out of "
                "adapter.target_modules"
            ) from None

    def _sum_group(self, shapes: Mapping[str, Shape]) -> dict[str, FixedPointSum]:
        tops: list[float] | None = None
        while True:
            sums = self._sum_local_batches(shapes, tops)
            most = self.world.max_over_ranks(*(found.largest for found in sums.values()))
            if math.inf in most:
                name = list(sums)[most.index(math.inf)]
                raise UserError(
                    f"{self.key}: the training data give infinite or NaN values in {name}; set "
                    "base.compute_dtype to bfloat16 or float32"
                )
            if all(m <= found.limit for m, found in zip(most, sums.values(), strict=True)):
                break
            tops = most
        for found in sums.values():
            self.world.all_reduce_sum(found.total)
        return sums

    def _sum_local_batches(
        self, shapes: Mapping[str, Shape], tops: list[float] | None
    ) -> dict[str, FixedPointSum]:
        """Sum this rank's batches; ``tops``: largest magnitudes, None: those of the first batch."""
        sums: dict[str, FixedPointSum] = {}
        for batch in self.batches:
            mark_progress()
            self.world.raise_if_stop_requested()
            own = dict(self.run(list(shapes), batch))
            if tops is None:
                largest = [
                    FixedPointSum.find_largest(own[name]) if name in own else 0.0 for name in shapes
                ]
                tops = self.world.max_over_ranks(
                    *(value if self.world.is_first else 0.0 for value in largest)
                )
            if not sums:
                sums = {
                    name: FixedPointSum(
                        shape, 0.0 if math.isinf(top) else top, self.samples, self.device
                    )
                    for (name, shape), top in zip(shapes.items(), tops, strict=True)
                }
            for name in shapes:
                if name in own:
                    sums[name].add_sample(own.pop(name))
        return sums


def _split_into_groups(shapes: Mapping[str, Shape], entries: int) -> list[list[str]]:
    """Split the names, in order, into groups of at most ``entries`` or one."""
    groups: list[list[str]] = []
    room = 0
    for name, shape in shapes.items():
        size = math.prod(shape)
        if not groups or size > room:
            groups.append([])
            room = entries
        groups[-1].append(name)
        room -= size
    return groups
