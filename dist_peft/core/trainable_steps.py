"""The optimizer steps in which a parameter is trained, as a function of the step alone.

::

    step           0    5    10   15   20
    ranges         |====|    |=========       (0, 5) (10, None)
    sampled block  |    |####|    |####|      one of the blocks drawn for these 5 steps (LISA)

A resumed run needs no other state to continue, and each rank finds the same steps. LISA (Pan et al.
2024, Algorithm 1) draws, every ``period`` steps, which blocks are trained; here all blocks' draws
come from (seed, period number).
"""

import functools
import random
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["ALWAYS", "BlockSampling", "SampledBlock", "TrainableSteps"]

StepRange = tuple[int, int | None]
"""First step and the step after the last, counted as steps done before; None: without end."""


@dataclass(frozen=True)
class BlockSampling:
    """Draws blocks without repetition, once every ``period`` steps.

    Attributes:
        num_blocks: of the model.
        count: blocks drawn at a time.
    """

    seed: int
    num_blocks: int
    count: int
    period: int

    def list_blocks(self, step: int) -> tuple[int, ...]:
        """Return the numbers of the blocks that are trained in ``step``."""
        return _draw_blocks(self, step // self.period)


@functools.lru_cache(maxsize=4096)
def _draw_blocks(sampling: BlockSampling, number: int) -> tuple[int, ...]:
    generator = random.Random(f"blocks {sampling.seed} {number}")
    return tuple(generator.sample(range(sampling.num_blocks), sampling.count))


@dataclass(frozen=True)
class SampledBlock:
    """Block number ``block`` of a ``sampling``."""

    sampling: BlockSampling
    block: int

    def includes(self, step: int) -> bool:
        return self.block in self.sampling.list_blocks(step)


@dataclass(frozen=True)
class TrainableSteps:
    """Steps of some ranges, and those of a sampled block.

    Attributes:
        ranges: disjoint, in their order.
    """

    ranges: tuple[StepRange, ...] = ((0, None),)
    sampled: SampledBlock | None = None

    def includes(self, step: int) -> bool:
        """Return whether a parameter is updated after ``step`` steps are done."""
        inside = any(start <= step and (stop is None or step < stop) for start, stop in self.ranges)
        return inside or (self.sampled is not None and self.sampled.includes(step))

    def count_until(self, step: int) -> int:
        """Return the number of updates in the first ``step`` steps."""
        if self.sampled is not None:  # only asked at a resume
            return sum(self.includes(done) for done in range(step))
        ends = [(start, step if stop is None else min(stop, step)) for start, stop in self.ranges]
        return sum(max(0, stop - start) for start, stop in ends)

    def join(self, other: "TrainableSteps") -> "TrainableSteps":
        """Return the steps of either; of two sampled blocks (a shared parameter) the first's."""
        return TrainableSteps(
            _merge_ranges([*self.ranges, *other.ranges]), self.sampled or other.sampled
        )


ALWAYS = TrainableSteps()


def _merge_ranges(ranges: Iterable[StepRange]) -> tuple[StepRange, ...]:
    merged: list[StepRange] = []
    for start, stop in sorted(ranges, key=lambda entry: entry[0]):
        if not merged:
            merged.append((start, stop))
            continue
        first, last = merged[-1]
        if last is None:
            break
        if start > last:
            merged.append((start, stop))
        else:
            merged[-1] = (first, None if stop is None else max(last, stop))
    return tuple(merged)
