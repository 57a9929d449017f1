"""The change of merged weights from one adapter to another, as a merger.

Of weights ``V`` that were merged with an adapter::

    taken out   LoRA, VeRA, ...   W = V - D                IA3   W = V / l
    put in      LoRA, VeRA, ...   W + D'                   IA3   W l'        DoRA   its merge of W

in float64, rounded once to the output type. ``D`` and ``l`` do not depend on ``W``. DoRA's change
does: it divides a row by the norm of ``W + s B A``, which the merged row no longer has, so that
DoRA can be put in and not taken out. Trained weights can be neither.

The weights were rounded when the first adapter was merged and are rounded again, so that the result
differs from a merge of the other into the base; ``RoundingError`` measures the second rounding. A
merge that kept the base's zeros shows them: ``V`` is zero where ``W`` is, and stays so.
"""

import math
import threading
from collections.abc import Collection, Mapping
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from dist_peft.adapters.protocol import WeightMerger
from dist_peft.core.errors import UserError
from dist_peft.core.span import Span
from dist_peft.quant.codec_defaults import AffineParts, AffineRows

__all__ = [
    "AdditiveMerger",
    "RoundingError",
    "ScalingMerger",
    "SwitchableMerger",
    "TaskChange",
    "require_switchable_merger",
]


@runtime_checkable
class AdditiveMerger(Protocol):
    """A ``WeightMerger`` that adds the same to whatever base it is merged into."""

    def changes_weight(self, weight: str) -> bool:
        """Return whether the adapter changes this weight."""
        ...

    def check_weight_shapes(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Raise UserError unless the adapter fits ``shapes``: weight -> rows and columns."""
        ...

    def merge_weight_rows(
        self, weight: str, rows: Tensor, span: Span, in_base: Literal["original", "decoded"]
    ) -> Tensor:
        """Return ``rows`` with the adapter in them, float32. See ``WeightMerger``."""
        ...

    def depends_on_base(self, weight: str) -> bool:
        """Return whether the change of this weight does depend on the base (DoRA)."""
        ...

    def compute_delta_rows(self, weight: str, span: Span) -> Tensor:
        """Return the change that a merge into the original base adds to rows ``span``, float32.

        Raises:
            UserError: the change depends on the base.
        """
        ...


@runtime_checkable
class ScalingMerger(Protocol):
    """A ``WeightMerger`` that multiplies whatever base it is merged into by the same."""

    def changes_weight(self, weight: str) -> bool:
        """Return whether the adapter changes this weight."""
        ...

    def check_weight_shapes(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Raise UserError unless the adapter fits ``shapes``: weight -> rows and columns."""
        ...

    def compute_factor_rows(self, weight: str, span: Span) -> Tensor:
        """Return the factors of rows ``span``, float32, which broadcast to these rows."""
        ...


SwitchableMerger = AdditiveMerger | ScalingMerger


def require_switchable_merger(merger: WeightMerger, subject: str) -> SwitchableMerger:
    """Return ``merger``, which adds to weights or scales them.

    Raises:
        UserError: it does neither; ``subject`` names the adapter.
    """
    if isinstance(merger, AdditiveMerger | ScalingMerger):
        return merger
    raise UserError(
        f"{subject} replaces weights instead of adding to them or scaling them, so a merge of it "
        "cannot be taken back; merge the other run into the base"
    )


def _take_out(merger: SwitchableMerger, weight: str, rows: Tensor, span: Span) -> Tensor:
    """Return the base's rows ``span`` of merged ``rows``, float64."""
    if isinstance(merger, AdditiveMerger):
        return rows - merger.compute_delta_rows(weight, span).to(rows.device)
    factor = merger.compute_factor_rows(weight, span).to(rows.device)
    if not factor.all():
        raise UserError(
            f"{weight}: the adapter multiplies weights by 0, and their values are lost; merge the "
            "other run into the base"
        )
    return rows / factor


def _put_in(merger: SwitchableMerger, weight: str, rows: Tensor, span: Span) -> Tensor:
    """Return the merged rows ``span`` of the base's ``rows``, float64."""
    if isinstance(merger, ScalingMerger):
        return rows * merger.compute_factor_rows(weight, span).to(rows.device)
    if merger.depends_on_base(weight):
        return merger.merge_weight_rows(weight, rows, span, "original").double()
    return rows + merger.compute_delta_rows(weight, span).to(rows.device)


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
    """Takes the change of ``removed`` out of rows and puts that of ``added`` in; a
    ``WeightMerger``.

    Args:
        removed, added: None: no adapter.
        dtype: type that the rows will be rounded to.
        with_zeros: weights whose zeros are the base's and stay.

    Attributes:
        rounding: of the changed weights, relative to the change by ``added`` (``removed``, if
            there is no other).
    """

    def __init__(
        self,
        removed: SwitchableMerger | None,
        added: SwitchableMerger | None,
        dtype: torch.dtype,
        with_zeros: Collection[str] = (),
    ) -> None:
        steps = ((removed, _take_out), (added, _put_in))
        self._steps = [(merger, apply) for merger, apply in steps if merger is not None]
        self._dtype, self._with_zeros = dtype, frozenset(with_zeros)
        self._rows_left: dict[str, int] = {}
        self.rounding = RoundingError()

    def changes_weight(self, weight: str) -> bool:
        return any(merger.changes_weight(weight) for merger, _ in self._steps)

    def check_weight_shapes(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        for merger, _ in self._steps:
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
        for merger, apply in self._steps:
            if merger.changes_weight(weight):
                before, changed = changed, apply(merger, weight, changed, span)
                if weight in self._with_zeros:
                    changed = changed.masked_fill(rows == 0, 0)
                change = changed - before
        rounded = changed.to(self._dtype)
        self.rounding.add_rows(rounded.double() - changed, change)
        self._rows_left[weight] -= len(span)
        return rounded

    def compute_encoded_rows(self, weight: str, rows: Tensor, span: Span) -> Tensor:
        return rows

    def finish_packed_rows(
        self, weight: str, packed: Tensor, span: Span, rows: AffineRows | None, columns: int
    ) -> Tensor:
        return packed

    def merge_affine_parts(self, weight: str, parts: AffineParts, span: Span) -> AffineParts:
        raise AssertionError("zeros are changed by export.task_switch")

    def compute_group_change(self, weight: str, parts: AffineParts, span: Span) -> Tensor:
        raise AssertionError("zeros are changed by export.task_switch")

    def list_unused_tensors(self) -> list[str]:
        return [name for name, rows in self._rows_left.items() if rows > 0]
