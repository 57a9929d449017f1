"""Folding IA3's vectors into weight rows, without a model.

Row-local, as ``adapters.lora.merge``::

    output:  W'_o = l_o W_o     b'_o = l_o b_o
    input:   W'_oi = W_oi l_i

Each merged number is one float32 product, rounded once.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Never

from torch import Tensor

from dist_peft.core.errors import UserError
from dist_peft.core.span import Span
from dist_peft.quant.codec_defaults import AffineParts

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


class Ia3Merger:
    """Multiplies rows or columns of the adapted weights by their rescaling vectors.

    Args:
        rescalings: module path -> its vector.
    """

    def __init__(self, rescalings: Mapping[str, Rescaling]) -> None:
        self._rescalings = {f"{path}.weight": own for path, own in rescalings.items()}
        # biases are known once check_shapes has seen which linears of the base have one
        self._biases: dict[str, Rescaling] = {}
        self._rows_left: dict[str, int] = {}

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
            if weight not in shapes:
                raise UserError(
                    f"the adapter adapts {weight.removesuffix('.weight')}, which the base does not "
                    "have: it belongs to another base"
                )
            rows, columns = shapes[weight]
            self._check_size(weight, columns if own.rescales_input else rows)
            self._rows_left[weight] = rows
            bias = weight.removesuffix("weight") + "bias"
            if bias in shapes and not own.rescales_input:
                self._biases[bias] = own
                self._rows_left[bias] = rows

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
        if weight in self._biases:
            vector = self._biases[weight].vector[span.slice].to(rows.device)
            merged = rows.float() * vector
        else:
            own = self._rescalings[weight]
            rows, vector = rows.float(), own.vector.to(rows.device)
            if own.rescales_input:
                self._check_size(weight, rows.shape[1])
                merged = rows * vector
            else:
                merged = rows * vector[span.slice, None]
        self._rows_left[weight] -= len(span)
        return merged

    def subtract_initial_delta(self, weight: str, rows: Tensor, span: Span) -> Tensor:
        """Return the rows that were quantized: ``rows`` themselves."""
        return rows

    def merge_affine_parts(self, weight: str, parts: AffineParts, span: Span) -> Never:
        """Refuse: zeros cannot hold a factor.

        Raises:
            UserError: always.
        """
        self.compute_group_change(weight, parts, span)

    def compute_group_change(self, weight: str, parts: AffineParts, span: Span) -> Never:
        """Refuse: a factor changes the weights of a group differently.

        Raises:
            UserError: always.
        """
        raise UserError(
            f"{weight}: IA3 multiplies weights, which the zeros of an integer base cannot hold; "
            "only adapter.kind qalora merges into zeros"
        )

    def list_unused_tensors(self) -> list[str]:
        """Return adapted weights and biases of which not every row was merged."""
        unseen = [name for name in self._rescalings if name not in self._rows_left]
        return [*unseen, *(name for name, rows in self._rows_left.items() if rows > 0)]

    def _check_size(self, weight: str, size: int) -> None:
        own = self._rescalings[weight]
        if len(own.vector) != size:
            side = "columns" if own.rescales_input else "rows"
            raise UserError(
                f"{weight}: the adapter is for a weight of {len(own.vector)} {side}, but the "
                f"base's has {size}; it belongs to another base"
            )
