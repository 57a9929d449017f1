import pytest
import torch

from dist_peft.adapters.protocol import WeightMerger
from dist_peft.core.errors import UserError
from dist_peft.core.span import Span
from dist_peft.export.task_change import (
    AdditiveMerger,
    RoundingError,
    TaskChange,
    require_additive_merger,
)
from tests.support.adapters import AdditiveChange


def test_one_change_goes_and_another_comes() -> None:
    torch.manual_seed(0)
    weight, old, new = (torch.randn(7, 3) for _ in range(3))
    merged = (weight + old).bfloat16()
    shapes = {"a.weight": (7, 3), "b.weight": (7, 3), "c.weight": (2, 2)}
    removed, added = AdditiveChange({"a.weight": old}), AdditiveChange({"a.weight": new})
    change = TaskChange(removed, added, torch.bfloat16)
    change.check_weight_shapes(shapes)
    assert change.changes_weight("a.weight") and not change.changes_weight("b.weight")
    exact = merged.double() - old.double() + new.double()
    parts = [change.merge_weight_rows("a.weight", merged[s.slice], s, "original") for s in SPANS]
    assert change.list_unused_tensors() == []
    assert torch.equal(torch.cat(parts), exact.bfloat16())
    error = (exact.bfloat16().double() - exact).square().sum() / new.double().square().sum()
    assert change.rounding.share == pytest.approx(float((2 * error) ** 0.5), rel=1e-6)


SPANS = [Span(0, 5), Span(5, 7)]


def test_rows_that_did_not_come_are_listed() -> None:
    change = TaskChange(None, AdditiveChange({"a.weight": torch.ones(7, 3)}), torch.float32)
    change.check_weight_shapes({"a.weight": (7, 3)})
    change.merge_weight_rows("a.weight", torch.zeros(5, 3), SPANS[0], "decoded")
    assert change.list_unused_tensors() == ["a.weight"]
    assert TaskChange(None, None, torch.float32).rounding.share == RoundingError().share == 0


def test_mergers_that_scale_or_replace_are_refused() -> None:
    class Scales:
        def changes_weight(self, weight: str) -> bool:
            return True

    scales: WeightMerger = Scales()  # type: ignore[assignment]
    with pytest.raises(UserError, match="runs/a replaces or scales weights"):
        require_additive_merger(scales, "runs/a")
    additive: WeightMerger = AdditiveChange({})  # type: ignore[assignment]
    assert isinstance(require_additive_merger(additive, "runs/b"), AdditiveMerger)
