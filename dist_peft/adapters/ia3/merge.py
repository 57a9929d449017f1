"""Folding IA3's vectors into weight rows, without a model.

Row-local, as ``adapters.lora.merge``::

    output:  W'_o = l_o W_o     b'_o = l_o b_o
    input:   W'_oi = W_oi l_i

Each merged number is one float32 product, rounded once.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from dist_peft.adapters.low_rank.float_rows_merger import FloatRowsMerger, find_weight_shape
from dist_peft.core.errors import UserError
from dist_peft.core.span import Span

__all__ = ["Ia3Merger", "Rescaling"]


@dataclass(frozen=True)
class Rescaling:
    """The vector of one adapted linear.

    Attributes:
        vector: ``l``, float32 ``[out]`` or ``[in]``.
        rescales_input: whether it is ``[in]``.
    """

    vector: Tensor
    rescales_input: bool


class Ia3Merger(FloatRowsMerger):
    """Multiplies rows or columns of the adapted weights by their rescaling vectors.

    Args:
        rescalings: module path -> its vector.
    """

    def __init__(self, rescalings: Mapping[str, Rescaling]) -> None:
        super().__init__("IA3 multiplies weights")
        self._rescalings = {f"{path}.weight": own for path, own in rescalings.items()}
        # biases are known once check_shapes has seen which linears of the base have one
        self._biases: dict[str, Rescaling] = {}

    def changes_weight(self, weight: str) -> bool:
        """Return whether the adapter changes this weight or, after ``check_weight_shapes``, this
        bias."""
        return weight in self._rescalings or weight in self._biases

    def check_weight_shapes(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Compare the adapter with the base's shapes, and find the biases to merge.

        Args:
            shapes: weight name -> rows and columns in the base; of a bias one column.

        Raises:
            UserError: the base has no such weight, or of another shape.
        """
        for weight, own in self._rescalings.items():
            rows, columns = find_weight_shape(weight, shapes)
            self._check_size(weight, columns if own.rescales_input else rows)
            self.rows_left[weight] = rows
            bias = weight.removesuffix("weight") + "bias"
            if bias in shapes and not own.rescales_input:
                self._biases[bias] = own
                self.rows_left[bias] = rows

    def merge_weight_rows(
        self, weight: str, rows: Tensor, span: Span, in_base: Literal["original", "decoded"]
    ) -> Tensor:
        """Return rows ``span`` of a weight or bias with the adapter in them.

        Args:
            weight: a name that ``changes_weight``.
            rows: floating point ``[len(span), columns]``; of a bias ``[len(span)]``.
            span: rows of the weight.
            in_base: of no effect: IA3 changes no row before it is encoded.

        Returns:
            float32, the shape of ``rows``.
        """
        if weight not in self._biases and self._rescalings[weight].rescales_input:
            self._check_size(weight, rows.shape[1])
        merged = rows.float() * self.compute_factor_rows(weight, span).to(rows.device)
        self.rows_left[weight] -= len(span)
        return merged

    def compute_factor_rows(self, weight: str, span: Span) -> Tensor:
        """Return the factors of rows ``span`` of a weight, float32 ``[len(span), 1]`` or ``[in]``;
        of a bias ``[len(span)]``."""
        if weight in self._biases:
            return self._biases[weight].vector[span.slice]
        own = self._rescalings[weight]
        return own.vector if own.rescales_input else own.vector[span.slice, None]

    def list_unused_tensors(self) -> list[str]:
        """Return adapted weights and biases of which not every row was merged."""
        unseen = [name for name in self._rescalings if name not in self.rows_left]
        return [*unseen, *super().list_unused_tensors()]

    def _check_size(self, weight: str, size: int) -> None:
        own = self._rescalings[weight]
        if len(own.vector) != size:
            side = "columns" if own.rescales_input else "rows"
            raise UserError(
                f"{weight}: the adapter is for a weight of {len(own.vector)} {side}, but the "
                f"base's has {size}; it belongs to another base"
            )
