"""Merging a change that does not depend on the weight: ``W' = W + D``, row by row.

A method gives a ``WeightDelta``: rows of ``D``. A merge writes the same bytes whatever
its chunks if a row of ``D`` does not depend on which rows are computed with it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from dist_peft.adapters.low_rank.blocked_product import add_blocked_product
from dist_peft.adapters.low_rank.float_rows_merger import FloatRowsMerger, find_weight_shape
from dist_peft.core.errors import UserError
from dist_peft.core.span import Span

__all__ = ["DeltaMerger", "ProductDelta", "WeightDelta"]


class WeightDelta(Protocol):
    """The change of one weight."""

    @property
    def shape(self) -> tuple[int, int | None]:
        """Of the weight, ``[out, in]``; ``None``: as many columns as the weight has."""
        ...

    def add_to_rows(self, rows: Tensor, span: Span) -> Tensor:
        """Return ``rows`` with rows ``span`` of the change added, float32."""
        ...


@dataclass(frozen=True)
class ProductDelta:
    """``B A``: ``B`` [out, r], ``A`` [r, in], scaled, float32."""

    B: Tensor
    A: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.B.shape[0], self.A.shape[1]

    def add_to_rows(self, rows: Tensor, span: Span) -> Tensor:
        """Return ``rows`` with rows ``span`` of ``B A`` added, float32."""
        return add_blocked_product(rows, self.B, self.A.to(rows.device), span)


class DeltaMerger(FloatRowsMerger):
    """The ``WeightMerger`` of changes.

    Args:
        method_name: for messages.
        deltas: module path -> its change.
    """

    def __init__(self, method_name: str, deltas: Mapping[str, WeightDelta]) -> None:
        super().__init__(f"{method_name} changes the weights of a group differently")
        self._deltas = {f"{path}.weight": delta for path, delta in deltas.items()}
        self.rows_left = {name: delta.shape[0] for name, delta in self._deltas.items()}
        self._columns: dict[str, int] = {}

    def changes_weight(self, weight: str) -> bool:
        """Return whether the adapter changes this weight."""
        return weight in self._deltas

    def check_weight_shapes(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Compare the adapter with the base's shapes. See ``WeightMerger``.

        Raises:
            UserError: the base has no such weight, or of another shape.
        """
        for weight in self._deltas:
            rows, columns = find_weight_shape(weight, shapes)
            self._check_shape(weight, rows, columns, is_whole=True)
            self._columns[weight] = columns

    def merge_weight_rows(
        self, weight: str, rows: Tensor, span: Span, in_base: Literal["original", "decoded"]
    ) -> Tensor:
        """Return rows ``span`` of a weight with the adapter in them, float32.

        Args:
            weight: a name that ``changes_weight``.
            rows: floating point ``[len(span), in]``.
            span: rows of the weight.
            in_base: of no effect: nothing was taken from a row before it was encoded.

        Raises:
            UserError: the shapes show that the adapter belongs to another base.
        """
        delta = self._deltas[weight]
        self._check_shape(weight, span.stop, rows.shape[1])
        merged = delta.add_to_rows(rows, span)
        self.rows_left[weight] -= len(span)
        return merged

    def depends_on_base(self, weight: str) -> bool:
        """Return False: the same is added to any base."""
        return False

    def compute_delta_rows(self, weight: str, span: Span) -> Tensor:
        """Return the change of rows ``span``, float32; after ``check_weight_shapes``."""
        zeros = torch.zeros(len(span), self._columns[weight])
        return self._deltas[weight].add_to_rows(zeros, span)

    def _check_shape(self, weight: str, rows: int, columns: int, *, is_whole: bool = False) -> None:
        out, inputs = self._deltas[weight].shape
        fits = rows == out if is_whole else rows <= out
        if not fits or inputs not in (None, columns):
            raise UserError(
                f"{weight}: the adapter is for a weight of {out} rows"
                f"{'' if inputs is None else f' and {inputs} columns'}, but the base's has "
                f"{rows}{'' if is_whole else ' or more'} rows of {columns}; it belongs to another "
                "base"
            )
