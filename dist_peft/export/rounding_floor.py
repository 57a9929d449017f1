"""Tell the rounding of 16-bit training from a wrong export.

The probe's logits come from 16-bit forward passes. Where training changed little, their rounding is
a large share of that change, and an export that is right exceeds a bound of 5 %. A second look
takes the rounding of the export's own forward pass away: it computes in float32, once with the
export and once with the base that training saw. With the probe's ``t`` (trained) and ``b`` (before
training), the float32 logits ``m`` of the export and ``o`` of the base, and rms norms,

    floor  = |o - b| / |t - b|             rounding of one 16-bit forward pass of the same model
    error  = |m - t| / |t - b|             that rounding, and what is wrong with the export
    kept   = <m - o, t - b> / |t - b|^2    share of the change by training in the export: 1; of an
                                           export without the adapter 0, with twice the scaling 2

A right export has two independent roundings of about the size of the floor in ``error``: that of
the trained model's forward pass, and that of merged 16-bit weights. Together sqrt(2) floors, hence
``FLOOR_FACTOR`` 1.5; its 16-bit forward pass adds a third, sqrt(3), hence ``FLOOR_FACTOR_16BIT`` 2.
Rounding is spread over all directions of the logits and hardly has a part along the change, so
that ``kept`` has the bound of every exact form. Above ``MAX_FLOOR`` the probe cannot tell: a left
out layer can be smaller than the rounding.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dist_peft.export.verify import EXACT_BOUND, Probe, compare_logits

__all__ = [
    "FLOOR_FACTOR",
    "FLOOR_FACTOR_16BIT",
    "MAX_FLOOR",
    "RoundingFloor",
    "measure_rounding_floor",
]

FLOOR_FACTOR = 1.5
"""Largest error in float32, in floors."""

FLOOR_FACTOR_16BIT = 2.0
"""Largest error of the output's own 16-bit forward pass, in floors."""

MAX_FLOOR = 0.2
"""Largest floor, relative to the change by training, with which an output can be verified."""


@dataclass(frozen=True)
class RoundingFloor:
    """Figures of the second look in float32, relative to the change by training.

    Attributes:
        floor: difference of the base's logits in float32 from those before training.
        error: difference of the output's logits in float32 from those of the trained model.
        kept: share of the change by training that is in the output; 1 is right.
    """

    floor: float
    error: float
    kept: float

    @property
    def is_conclusive(self) -> bool:
        """Whether the rounding is small enough to tell a right output from a wrong one."""
        return self.floor <= MAX_FLOOR

    def explains_error(self, relative: float) -> bool:
        """Return whether rounding alone explains the error ``relative`` of the 16-bit output."""
        return (
            self.is_conclusive
            and self.error <= FLOOR_FACTOR * self.floor
            and relative <= FLOOR_FACTOR_16BIT * self.floor
            and abs(self.kept - 1) <= EXACT_BOUND
        )

    def __str__(self) -> str:
        return (
            f"in float32 the error is {self.error:.1%}, rounding alone moves the base by "
            f"{self.floor:.1%}, and {self.kept:.1%} of the change by training is in it"
        )

    def format_rows(self) -> list[tuple[str, str]]:
        """Return the rows of a table: (quantity, value)."""
        return [
            ("Error computed in float32", f"{self.error:.2%}"),
            ("16-bit rounding of the base alone", f"{self.floor:.2%}"),
            ("Change by training that is kept", f"{self.kept:.1%}"),
        ]


def measure_rounding_floor(output: Tensor, base: Tensor, probe: Probe) -> RoundingFloor:
    """Compare the logits of a second look in float32 with the probe.

    Args:
        output, base: float32 logits of the output, and of the base that training saw without an
            adapter, in the shape of the probe's.
        probe: the run's probe; training changed its logits.

    Raises:
        UserError: the shapes differ.
    """
    return RoundingFloor(
        floor=compare_logits(base, probe.swap_models()).relative,
        error=compare_logits(output, probe).relative,
        kept=_project_on_change(output, base, probe),
    )


def _project_on_change(output: Tensor, base: Tensor, probe: Probe) -> float:
    """Return ``<output - base, change> / <change, change>``, position by position in float64."""
    product = square = torch.zeros((), dtype=torch.float64)
    size = probe.trained.shape[-1]
    tensors = (each.reshape(-1, size) for each in (output, base, probe.trained, probe.before))
    for got, origin, trained, before in zip(*tensors, strict=True):
        change = _subtract(trained, before)
        product = product + (_subtract(got, origin) * change).sum()
        square = square + change.square().sum()
    return (product / square).item()


def _subtract(left: Tensor, right: Tensor) -> Tensor:
    """Return ``left - right`` in float64, with 0 where both are the same infinity."""
    return torch.where(left == right, 0.0, left.double() - right.double())
