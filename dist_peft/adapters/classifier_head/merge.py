"""Merging a trained head: its parameters take the place of the base's, or are added to them.

``HeadMerger`` wraps the merger of the trunk (``adapters.lora.merge.LoraMerger``), as
``adapters.classifier_head.method.HeadedAdapter`` stands around a method in training.
"""

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from dist_peft.adapters.protocol import WeightMerger
from dist_peft.core.errors import UserError
from dist_peft.core.span import Span
from dist_peft.quant.codec_defaults import AffineParts, AffineRows

__all__ = ["HeadMerger"]


class HeadMerger:
    """Merges a trained head into its weights, and the trunk through the merger of its adapter.

    Args:
        trunk: merges everything else.
        head: trained parameters by the model's names.
    """

    def __init__(self, trunk: WeightMerger, head: Mapping[str, Tensor]) -> None:
        self._trunk, self._head = trunk, head
        self._left = {name: len(value) for name, value in head.items()}

    def changes_weight(self, weight: str) -> bool:
        return weight in self._head or self._trunk.changes_weight(weight)

    def check_weight_shapes(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Compare the trunk's adapter with the base, and the head with weights that the base has.

        Raises:
            UserError: a shape differs, or the base lacks an adapted weight of the trunk.
        """
        self._trunk.check_weight_shapes(shapes)
        for name, value in self._head.items():
            rows, columns = len(value), value[0].numel() if value.dim() > 1 else 1
            if shapes.get(name, (rows, columns)) != (rows, columns):
                raise UserError(
                    f"the adapter's {name} has shape {list(value.shape)}, but the model's is "
                    f"{list(shapes[name])}; it belongs to another base or to other labels"
                )

    def merge_weight_rows(
        self, weight: str, rows: Tensor, span: Span, in_base: Literal["original", "decoded"]
    ) -> Tensor:
        """Return rows ``span`` of the trained parameter, float32, or the trunk merger's rows."""
        if weight not in self._head:
            return self._trunk.merge_weight_rows(weight, rows, span, in_base)
        self._left[weight] -= len(span)
        return self._head[weight][span.slice].float()

    def compute_encoded_rows(self, weight: str, rows: Tensor, span: Span) -> Tensor:
        return self._trunk.compute_encoded_rows(weight, rows, span)

    def finish_packed_rows(
        self, weight: str, packed: Tensor, span: Span, rows: AffineRows | None, columns: int
    ) -> Tensor:
        return self._trunk.finish_packed_rows(weight, packed, span, rows, columns)

    def merge_affine_parts(self, weight: str, parts: AffineParts, span: Span) -> AffineParts:
        return self._trunk.merge_affine_parts(weight, parts, span)

    def compute_group_change(self, weight: str, parts: AffineParts, span: Span) -> Tensor:
        return self._trunk.compute_group_change(weight, parts, span)

    def list_unused_tensors(self) -> list[str]:
        """Adapted weights, and parameters of the head, of which not every row was merged."""
        return [
            *(name for name, rows in self._left.items() if rows),
            *self._trunk.list_unused_tensors(),
        ]
