"""Sums in 64-bit fixed point, whose bits do not depend on the order of addition.

Samples of a sum lie on several ranks. Added up as floats, they would give other last bits with each
number of ranks; as integers of one unit they give the same::

    unit    2^-k, so that ``samples`` tensors with entries up to ``limit`` cannot overflow
    limit   2^16 times the largest entry of the first sample (rounded up to a power of two)

An entry keeps at least 40 bits below the largest one where samples are few.
"""

import math

import torch
from torch import Tensor

__all__ = ["FixedPointSum", "SplitSum"]

_HEADROOM_BITS = 16
"""A sample may have entries this many powers of two above the first one's."""


class FixedPointSum:
    """A sum of tensors of one shape.

    Args:
        shape: of the samples.
        first: largest magnitude in the first sample; it sets the unit, so it must be the same on
            all ranks, whose sums are added up.
        samples: most samples over all ranks.

    Attributes:
        total: int64; sums of several ranks are added up by the caller.
        largest: largest magnitude added here; infinite where a sample was not finite.
        limit: beyond it the sum is void: begin again, with ``largest`` as ``first``.
    """

    def __init__(
        self, shape: tuple[int, ...], first: float, samples: int, device: torch.device
    ) -> None:
        self.total = torch.zeros(shape, dtype=torch.int64, device=device)
        self.largest = 0.0
        top = math.frexp(first)[1] + _HEADROOM_BITS
        self.limit = math.ldexp(1.0, top)
        self._shift = 62 - (samples - 1).bit_length() - top

    @staticmethod
    def find_largest(sample: Tensor) -> float:
        """Return the largest magnitude of a sample; infinite where a value is not finite."""
        largest = max((abs(float(end)) for end in sample.aminmax()), default=0.0)
        return largest if math.isfinite(largest) else math.inf

    def add_sample(self, sample: Tensor) -> None:
        """Add a float tensor. Beyond ``limit`` the sum is void; ``largest`` tells."""
        self.largest = max(self.largest, self.find_largest(sample))
        if self.largest <= self.limit:  # else the integers would overflow
            scaled = sample.to(torch.float64, copy=True).mul_(math.ldexp(1.0, self._shift))
            self.total += scaled.round_().long()

    def to_float(self) -> Tensor:
        """The sum as float64."""
        return self.total.double().mul_(math.ldexp(1.0, -self._shift))


class SplitSum:
    """Sums of float64 values of any size below 2^53, as whole numbers and fractions of them.

    Losses and counts are of one unit in every run, unlike samples of a ``FixedPointSum``::

        x = whole + part 2^-32      2^31 values of each fit into int64

    Args:
        size: number of sums.

    Attributes:
        integers: int64 [size, 3]: whole numbers, parts, and how many values were not finite or too
            large. Those of several ranks are added up by the caller.
    """

    def __init__(self, size: int) -> None:
        self.integers = torch.zeros(size, 3, dtype=torch.int64)

    def add_rows(self, rows: Tensor, targets: Tensor) -> None:
        """Add each of ``rows`` [n, k] to the k sums from ``targets[i] * k`` on; ``targets`` [n]."""
        values = rows.detach().to("cpu", torch.float64)
        fits = values.abs() < 2.0**53  # false of NaN
        values = torch.where(fits, values, 0.0)
        whole = values.floor()
        parts = ((values - whole) * 2.0**32).round()
        found = torch.stack([whole.long(), parts.long(), (~fits).long()], 2)
        self.integers.view(-1, *found.shape[1:]).index_add_(0, targets, found)

    def to_floats(self) -> list[float]:
        """Return the sums; NaN where a value was not finite, or 2^53 and more."""
        return [
            math.nan if bad else whole + math.ldexp(part, -32)
            for whole, part, bad in self.integers.tolist()
        ]
