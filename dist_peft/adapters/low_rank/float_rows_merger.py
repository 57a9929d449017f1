"""What mergers share whose adapters change floating-point rows and no zeros of an integer base.

Only QA-LoRA's change is the same for all weights of a group, so that it fits into the group's zero
(``zero_points``). Others refuse, each with its reason.
"""

from collections.abc import Mapping
from typing import Never

from torch import Tensor

from dist_peft.core.errors import UserError
from dist_peft.core.span import Span
from dist_peft.quant.codec_defaults import AffineParts, AffineRows

__all__ = ["FloatRowsMerger", "find_weight_shape"]


def find_weight_shape(weight: str, shapes: Mapping[str, tuple[int, int]]) -> tuple[int, int]:
    """Return rows and columns of an adapted weight in the base.

    Raises:
        UserError: the base has no such weight.
    """
    if weight not in shapes:
        raise UserError(
            f"the adapter adapts {weight.removesuffix('.weight')}, which the base does not have: "
            "it belongs to another base"
        )
    return shapes[weight]


class FloatRowsMerger:
    """Members of a ``WeightMerger`` that takes nothing from rows before they are encoded.

    Args:
        why_no_zeros: what the method does to a weight that zeros cannot hold, for the message.

    Attributes:
        rows_left: adapted weight -> rows that were not merged yet.
    """

    def __init__(self, why_no_zeros: str) -> None:
        self._why_no_zeros = why_no_zeros
        self.rows_left: dict[str, int] = {}

    def compute_encoded_rows(self, weight: str, rows: Tensor, span: Span) -> Tensor:
        """Return the rows that were quantized: ``rows`` themselves."""
        return rows

    def finish_packed_rows(
        self, weight: str, packed: Tensor, span: Span, rows: AffineRows | None, columns: int
    ) -> Tensor:
        """Return ``packed``: no zeros were trained."""
        return packed

    def merge_affine_parts(self, weight: str, parts: AffineParts, span: Span) -> Never:
        """Refuse, as ``compute_group_change`` does.

        Raises:
            UserError: always.
        """
        self.compute_group_change(weight, parts, span)

    def compute_group_change(self, weight: str, parts: AffineParts, span: Span) -> Never:
        """Refuse: the weights of a group change differently.

        Raises:
            UserError: always.
        """
        raise UserError(
            f"{weight}: {self._why_no_zeros}, which the zeros of an integer base cannot hold; only "
            "adapter.kind qalora merges into zeros"
        )

    def list_unused_tensors(self) -> list[str]:
        """Return adapted weights of which not every row was merged."""
        return [name for name, rows in self.rows_left.items() if rows > 0]
