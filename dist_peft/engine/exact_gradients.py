"""Gradients of a step as sums of integers, whose bits do not depend on ranks (``train.exact``).

Float sums over micro-batches depend on their order, which the number of ranks decides: 1 rank
adds ``((g0 + g1) + g2) + g3``, 2 ranks ``(g0 + g2) + (g1 + g3)``. Integers are associative. Each
gradient of a micro-batch is converted once, whatever rank computed it::

    i = round(g / u)      int64, ties to even        u = 2^-k, fixed for the run
    I = sum of i          over micro-batches and ranks, in any order
    G = float32(I u)      rounded once

The unit comes from Adam's epsilon, ``u <= 2^-20 eps``: an update is ``m / (sqrt(v) + eps)``, so
that all of a gradient below ``u`` changes less than a millionth of the learning rate. The range is
that of int64, ``2^62 u`` for the sum, an equal part of it for each micro-batch: with ``eps`` 1e-8,
2^-47 (7e-15) to 2^15. A gradient beyond it ends the run (no other unit could be chosen without
looking at all ranks first).

EasyScale (Li et al., SC 2023) fixes the order of float sums instead, for data-parallel training,
which needs as many logical workers as the first run had.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from dist_peft.core.config.run import TrainConfig
from dist_peft.core.errors import RunFailure

__all__ = ["FixedPointGradients", "GradientRange", "GradientScale", "compute_exact_norm"]

_CHUNK = 2**22
"""Values converted at a time: the float64 and int64 temporaries have 64 MiB. Sums of squares of a
chunk are exact in float64 up to this size."""

_CPU_CHUNK = 2**18
"""The same on a CPU, whose cache holds the temporaries."""

_FINEST = -50
"""Exponent of the smallest unit, for runs with a tiny epsilon."""

Reduce = Callable[[Tensor, dist.ReduceOp.RedOpType], None]
"""Reduces a small tensor over ranks in place, by MAX or SUM."""


@dataclass(frozen=True)
class GradientScale:
    """The fixed-point format of a run's gradients.

    Attributes:
        exponent: the unit is ``2^exponent``.
        micro_batches: of a step, over all ranks.
    """

    exponent: int
    micro_batches: int

    @classmethod
    def from_config(cls, train: TrainConfig) -> "GradientScale":
        """Return the format for a run's epsilon and batch."""
        exponent = max(_FINEST, math.frexp(train.eps)[1] - 1 - 20)
        return cls(exponent, -(-train.global_batch // train.micro_batch))

    @property
    def unit(self) -> float:
        return math.ldexp(1.0, self.exponent)

    def check_range(self, largest: float) -> None:
        """Refuse a step whose sum may have overflowed.

        Args:
            largest: magnitude in any micro-batch, over all ranks.

        Raises:
            RunFailure: it is finite and exceeds ``limit``.
        """
        if self.limit < largest < math.inf:
            raise RunFailure(
                f"the gradient of a micro-batch has the value {largest:g}, and train.exact sums "
                f"integers of {self.unit:g} up to {self.limit:g} a micro-batch: no update was "
                "made. Lower train.lr or raise train.warmup if the loss diverges; in a new run, "
                "a larger train.eps has a wider range, and train.exact: false has no limit"
            )

    @property
    def limit(self) -> float:
        """The largest magnitude in the gradient of a micro-batch."""
        return math.ldexp(1.0, 62 + self.exponent) / self.micro_batches

    def describe(self) -> str:
        """Return the format in words, for records."""
        return f"int64, unit 2^{self.exponent}, {self.micro_batches} micro-batches of at most " + (
            f"{self.limit:g}"
        )

    def add_values(self, total: Tensor, values: Tensor) -> None:
        """Add float values [n] to an int64 sum [n]; void where ``GradientRange`` says so."""
        for own, part in zip(_split_flat(total), _split_flat(values), strict=True):
            # a product with a power of two and rounding to an integer are exact in float32
            own += part.mul(1 / self.unit).round_().long()

    def read_values(self, total: Tensor) -> Tensor:
        """Return an int64 sum [n] as float32, rounded once."""
        found = torch.empty(total.shape, dtype=torch.float32, device=total.device)
        for own, part in zip(_split_flat(found), _split_flat(total), strict=True):
            own.copy_(part.double().mul_(self.unit))
        return found


class GradientRange:
    """The largest magnitude in the gradients of this rank's micro-batches in a step."""

    def __init__(self, device: torch.device) -> None:
        self._largest = torch.zeros((), device=device)

    def note_values(self, values: Tensor) -> None:
        """Look at the gradient [n] of a micro-batch; no wait for the device."""
        if values.numel():
            low, high = values.aminmax()  # both are NaN where a value is
            self._largest = torch.maximum(self._largest, torch.maximum(-low, high))

    def take_largest(self) -> float:
        """Return the magnitude, infinite where a value was not finite, and begin a new step."""
        largest = float(self._largest)
        self._largest = torch.zeros_like(self._largest)
        return largest if math.isfinite(largest) else math.inf


class FixedPointGradients:
    """Sums of whole gradients of several parameters, on a rank that computes all of them.

    Args:
        sizes: numbers of values of trainable parameters, in an order that all ranks share.
    """

    def __init__(self, sizes: Sequence[int], scale: GradientScale, device: torch.device) -> None:
        self.scale, self.range = scale, GradientRange(device)
        self._device = device
        self._sizes = list(sizes)
        self._total: Tensor | None = None
        self._seen: set[int] = set()

    def add_micro_batch(self, grads: Sequence[Tensor | None]) -> None:
        """Add the gradients of a micro-batch, in the parameters' order; None: not computed."""
        total = self._get_total()
        first = 0
        for numbers in _group_small(self._sizes):
            known = [number for number in numbers if grads[number] is not None]
            length = sum(self._sizes[number] for number in numbers)
            if known:
                self._seen.update(known)
                flat = torch.cat([self._flatten(number, grads[number]) for number in numbers])
                self.range.note_values(flat)
                self.scale.add_values(total[first : first + length], flat)
            first += length

    def _flatten(self, number: int, grad: Tensor | None) -> Tensor:
        if grad is None:
            return torch.zeros(self._sizes[number], device=self._device)
        return grad.detach().flatten().float()

    def _get_total(self) -> Tensor:
        if self._total is None:
            self._total = torch.zeros(sum(self._sizes), dtype=torch.int64, device=self._device)
        return self._total

    def take_sums(self, reduce: Reduce | None) -> list[Tensor | None]:
        """Return the sums over micro-batches and ranks, float32 and flat, and begin a new step.

        Args:
            reduce: sums integers over ranks; None: this is the only one.

        Returns:
            By parameter; None where no micro-batch of this rank had a gradient. Void where
            ``range`` says so.
        """
        total = self._get_total()
        if reduce is not None:
            reduce(total, dist.ReduceOp.SUM)
        values = self.scale.read_values(total).split(self._sizes)
        seen, self._seen = self._seen, set()
        total.zero_()
        return [value if number in seen else None for number, value in enumerate(values)]


def _group_small(sizes: Sequence[int]) -> Iterator[range]:
    """Yield ranges of consecutive tensors of at most ``_CHUNK`` values, or of one larger one."""
    first = held = 0
    for number, size in enumerate(sizes):
        if number > first and held + size > _CHUNK:
            yield range(first, number)
            first, held = number, 0
        held += size
    if first < len(sizes):
        yield range(first, len(sizes))


def compute_exact_norm(
    grads: Iterable[Tensor], largest: float, scale: GradientScale, reduce: Reduce | None
) -> float:
    """Return the 2-norm of float32 gradients, the same bits however they are cut over ranks.

    Squares are exact in float64 (24 bits each). Relative to the largest one, ``y = (g / 2^e)^2`` in
    [0, 1], they are summed as two integers::

        y = hi 2^-30 + lo 2^-61       2^31 values of each fit into int64

    Args:
        grads: this rank's part of them, of any shapes.
        largest: magnitude in this rank's micro-batches, infinite where one was not finite.
        reduce: over the ranks that hold the other parts; None: there are none.

    Returns:
        NaN on every rank where a gradient was not finite on any.

    Raises:
        RunFailure: on every rank: a micro-batch exceeds the range of the sums.
    """
    flats = [grad.detach().flatten() for grad in grads]
    sizes = [flat.numel() for flat in flats]
    groups = [torch.cat([flats[n] for n in numbers]) for numbers in _group_small(sizes)]
    found = GradientRange(torch.device("cpu") if not groups else groups[0].device)
    for group in groups:
        found.note_values(group)
    top = torch.tensor([found.take_largest(), largest], dtype=torch.float64)
    if reduce is not None:
        reduce(top, dist.ReduceOp.MAX)
    most, most_of_parts = top.tolist()
    if not math.isfinite(most) or not math.isfinite(most_of_parts):
        return math.nan
    scale.check_range(most_of_parts)
    if most == 0:
        return 0.0
    exponent = math.frexp(most)[1]
    sums = torch.zeros(2, dtype=torch.int64)
    for group in groups:
        sums += _sum_squares(group, exponent).cpu()
    if reduce is not None:
        reduce(sums, dist.ReduceOp.SUM)
    high, low = sums.tolist()
    return math.sqrt(math.ldexp(high, -30) + math.ldexp(low, -61)) * math.ldexp(1.0, exponent)


def _sum_squares(values: Tensor, exponent: int) -> Tensor:
    """Return the two integers, int64 [2], of float values [n] of at most ``2^exponent``."""
    sums = torch.zeros(2, dtype=torch.int64, device=values.device)
    for part in _split_flat(values):
        squares = part.double().mul_(math.ldexp(1.0, 15 - exponent)).square_()
        whole = squares.floor()
        rest = squares.sub_(whole).mul_(2.0**31).floor_()
        sums += torch.stack([whole.sum(), rest.sum()]).long()  # below 2^53: exact in any order
    return sums


def _split_flat(values: Tensor) -> tuple[Tensor, ...]:
    """Return views of parts of a flat tensor that are converted at a time."""
    return values.split(_CPU_CHUNK if values.device.type == "cpu" else _CHUNK)
