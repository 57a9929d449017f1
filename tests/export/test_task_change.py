import pytest
import torch

from dist_peft.adapters.ia3.merge import Ia3Merger, Rescaling
from dist_peft.adapters.lora.merge import LoraMerger
from dist_peft.adapters.lora.tensors import LoraTensors
from dist_peft.adapters.protocol import WeightMerger
from dist_peft.core.errors import UserError
from dist_peft.core.span import Span
from dist_peft.export.task_change import (
    AdditiveMerger,
    RoundingError,
    ScalingMerger,
    TaskChange,
    require_switchable_merger,
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


def test_mergers_that_replace_are_refused() -> None:
    class Replaces:
        def changes_weight(self, weight: str) -> bool:
            return True

    replaces: WeightMerger = Replaces()  # type: ignore[assignment]
    with pytest.raises(UserError, match="runs/a replaces weights instead of adding to them"):
        require_switchable_merger(replaces, "runs/a")
    additive: WeightMerger = AdditiveChange({})  # type: ignore[assignment]
    assert isinstance(require_switchable_merger(additive, "runs/b"), AdditiveMerger)
    assert isinstance(require_switchable_merger(Ia3Merger({}), "runs/c"), ScalingMerger)


def ia3(seed: int) -> Ia3Merger:
    generator = torch.Generator().manual_seed(seed)
    vectors = [torch.rand(size, generator=generator) + 0.5 for size in (7, 3)]
    return Ia3Merger({"a": Rescaling(vectors[0], False), "c": Rescaling(vectors[1], True)})


def test_factors_are_divided_out() -> None:
    """Of weights on both sides and of a bias; a factor of zero has lost what it scaled."""
    torch.manual_seed(0)
    base = {"a.weight": torch.randn(7, 3), "a.bias": torch.randn(7), "c.weight": torch.randn(7, 3)}
    shapes = {name: (7, value[0].numel()) for name, value in base.items()}
    old, new = ia3(1), ia3(2)
    change = TaskChange(ia3(1), ia3(2), torch.float32)
    for merger in (old, new, change):
        merger.check_weight_shapes(shapes)
    for name, weight in base.items():
        for span in SPANS:
            merged, expected = (
                own.merge_weight_rows(name, weight[span.slice], span, "original")
                for own in (old, new)
            )
            found = change.merge_weight_rows(name, merged, span, "original")
            torch.testing.assert_close(found, expected, rtol=3e-7, atol=0)
    assert change.list_unused_tensors() == [] and 0 < change.rounding.share < 1e-6
    lost = Ia3Merger({"a": Rescaling(torch.tensor([0.0, *[1.0] * 6]), False)})
    with pytest.raises(UserError, match=r"a\.weight: the adapter multiplies weights by 0"):
        TaskChange(lost, None, torch.float32).merge_weight_rows(
            "a.weight", base["a.weight"], Span(0, 7), "original"
        )


def test_dora_is_put_in_and_not_taken_out() -> None:
    torch.manual_seed(0)
    weight, old = torch.randn(7, 3), torch.randn(7, 3)
    own = LoraTensors(torch.randn(2, 3), torch.randn(7, 2), 0.5, torch.rand(7) + 1, False, None)
    dora, alone = (LoraMerger({"a": own}, None, {}) for _ in range(2))
    change = TaskChange(AdditiveChange({"a.weight": old}), dora, torch.float32)
    change.check_weight_shapes({"a.weight": (7, 3)})
    expected = alone.merge_weight_rows("a.weight", weight, Span(0, 7), "original")
    found = [
        change.merge_weight_rows("a.weight", (weight + old)[s.slice], s, "original") for s in SPANS
    ]
    torch.testing.assert_close(torch.cat(found), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(UserError, match="adapted by DoRA, whose change depends on the base's rows"):
        TaskChange(dora, None, torch.float32).merge_weight_rows(
            "a.weight", expected, Span(0, 7), "original"
        )


def test_zeros_of_the_base_stay() -> None:
    torch.manual_seed(0)
    weight, old, new = (torch.randn(7, 3) for _ in range(3))
    zeros = weight.abs() < 0.5
    assert 0 < zeros.sum() < 21
    merged = (weight + old).masked_fill(zeros, 0).double()
    added = {"a.weight": new, "b.weight": new}
    removed = AdditiveChange({"a.weight": old, "b.weight": old})
    change = TaskChange(removed, AdditiveChange(added), torch.float64, ["a.weight"])
    change.check_weight_shapes(dict.fromkeys(added, (7, 3)))
    plain = merged - old.double() + new.double()
    for name, expected in (("a.weight", plain.masked_fill(zeros, 0)), ("b.weight", plain)):
        found = change.merge_weight_rows(name, merged, Span(0, 7), "original")
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-15)
