"""The change of merged weights from one adapter to another, as a merger.

Of weights that were merged with an adapter, ``W + D``, and another adapter's change ``D'``::

    W + D  ->  (W + D) - D + D'        float64, rounded once to the output type

Both changes must not depend on ``W``: LoRA and its relatives, not DoRA, IA3 or trained weights.
The weights were rounded when ``D`` was merged and are rounded again, so that the result differs
from a merge of ``D'`` into the base; ``RoundingError`` measures the second rounding.
"""

import math
import threading
from collections.abc import Mapping
from typing import Literal, Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from dist_peft.adapters.protocol import WeightMerger
from dist_peft.core.errors import UserError
from dist_peft.core.span import Span
from dist_peft.quant.codec_defaults import AffineParts

__all__ = ["AdditiveMerger", "RoundingError", "TaskChange", "require_additive_merger"]


@runtime_checkable
class AdditiveMerger(Protocol):
    """A ``WeightMerger`` that adds the same to whatever base it is merged into."""

    def changes_weight(self, weight: str) -> bool:
        """Return whether the adapter changes this weight."""
        ...

    def check_weight_shapes(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Raise UserError unless the adapter fits ``shapes``: weight -> rows and columns."""
        ...

    def compute_delta_rows(self, weight: str, span: Span) -> Tensor:
        """Return the change that a merge into the original base adds to rows ``span``, float32.

        Raises:
            UserError: the change depends on the base.
        """
        ...


def require_additive_merger(merger: WeightMerger, subject: str) -> AdditiveMerger:
    """Return ``merger`` as an ``AdditiveMerger``.

    Raises:
        UserError: it is none; ``subject`` names the adapter.
    """
    if not isinstance(merger, AdditiveMerger):
        raise UserError(
            f"{subject} replaces or scales weights instead of adding to them, so a merge of it "
            "cannot be taken back; merge the other run into the base"
        )
    return cast(AdditiveMerger, merger)


class RoundingError:
    """Sums of squares of rounding errors and of changes; threads may add to them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._error = self._change = 0.0

    def add_rows(self, error: Tensor, change: Tensor) -> None:
        sums = float(error.square().sum()), float(change.square().sum())
        with self._lock:
            self._error += sums[0]
            self._change += sums[1]

    @property
    def share(self) -> float:
        """Root mean square of two equal roundings over that of the change; 0 without a change."""
        return math.sqrt(2 * self._error / self._change) if self._change else 0.0


class TaskChange:
    """Takes the change of ``removed`` out of rows and adds that of ``added``; a ``WeightMerger``.

    Args:
        removed, added: None: no adapter.
        dtype: type that the rows will be rounded to.

    Attributes:
        rounding: of the changed weights, relative to the change by ``added`` (``removed``, if
            there is no other).
    """

    def __init__(
        self, removed: AdditiveMerger | None, added: AdditiveMerger | None, dtype: torch.dtype
    ) -> None:
        self._signed = [(m, sign) for m, sign in ((removed, -1), (added, 1)) if m is not None]
        self._dtype = dtype
        self._rows_left: dict[str, int] = {}
        self.rounding = RoundingError()

    def changes_weight(self, weight: str) -> bool:
        return any(merger.changes_weight(weight) for merger, _ in self._signed)

    def check_weight_shapes(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        for merger, _ in self._signed:
            merger.check_weight_shapes(shapes)
        self._rows_left = {
            name: rows for name, (rows, _) in shapes.items() if self.changes_weight(name)
        }

    def merge_weight_rows(
        self, weight: str, rows: Tensor, span: Span, in_base: Literal["original", "decoded"]
    ) -> Tensor:
        """Return rows with the other adapter in them, in the output type; ``in_base`` makes no
        difference."""
        changed, change = rows.double(), torch.zeros(())
        for merger, sign in self._signed:
            if merger.changes_weight(weight):
                change = merger.compute_delta_rows(weight, span).to(rows.device)
                changed.add_(change, alpha=sign)
        rounded = changed.to(self._dtype)
        self.rounding.add_rows(rounded.double().sub_(changed), change)
        self._rows_left[weight] -= len(span)
        return rounded

    def subtract_initial_delta(self, weight: str, rows: Tensor, span: Span) -> Tensor:
        return rows

    def merge_affine_parts(self, weight: str, parts: AffineParts, span: Span) -> AffineParts:
        raise AssertionError("zeros are changed by export.task_switch")

    def compute_group_change(self, weight: str, parts: AffineParts, span: Span) -> Tensor:
        raise AssertionError("zeros are changed by export.task_switch")

    def list_unused_tensors(self) -> list[str]:
        return [name for name, rows in self._rows_left.items() if rows > 0]
