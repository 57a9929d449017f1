"""Exports that a method's adapters do not allow, known before the training."""

from dataclasses import dataclass
from typing import Literal

__all__ = ["NONLINEAR_LIMITS", "ExportContent", "ExportLimits"]

ExportContent = Literal["merged", "separate", "adapter"]
"""Content of an export: weights with the adapter merged into them, the base as trained with a
separate adapter that PEFT loads on it, or the adapter alone in PEFT's format."""


@dataclass(frozen=True)
class ExportLimits:
    """Reasons against exports of a method's adapters; None: possible.

    Attributes:
        merged, separate, adapter: against each ``ExportContent``.
        gptq_linears: against a separate adapter on linears of GPTQ.
        bnb_linears: against a separate adapter on linears of bitsandbytes.
        fits_zero_points: a merge into an integer base keeps its codes and changes its zeros only.
        trained_codes: the merged weights in the base's own format were trained, and no
            base and adapter apart.
        fractional_zeros: their zeros are fractions, whatever the base's are.
    """

    merged: str | None = None
    separate: str | None = None
    adapter: str | None = None
    gptq_linears: str | None = None
    bnb_linears: str | None = None
    fits_zero_points: bool = False
    trained_codes: bool = False
    fractional_zeros: bool = False

    def get_reason(self, content: ExportContent) -> str | None:
        """Return the reason against ``content``."""
        reasons = {"merged": self.merged, "separate": self.separate, "adapter": self.adapter}
        return reasons[content]


_NONLINEAR = "a nonlinear adapter cannot be merged; AdapterHub's library loads adapter/"

NONLINEAR_LIMITS = ExportLimits(_NONLINEAR, _NONLINEAR, "PEFT does not support this adapter")
"""Those of bottleneck adapters and their fusion."""
