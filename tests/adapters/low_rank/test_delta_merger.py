import pytest
import torch

from dist_peft.adapters.low_rank.delta_merger import DeltaMerger, ProductDelta
from dist_peft.core.errors import UserError
from dist_peft.core.span import Span
from dist_peft.quant.affine import AffineParts

B, A = torch.randn(70, 2), torch.randn(2, 5)


def merger() -> DeltaMerger:
    return DeltaMerger("LoHa", {"m": ProductDelta(B, A)})


def test_rows_are_added_in_any_pieces() -> None:
    rows, made = torch.randn(70, 5), merger()
    made.check_weight_shapes({"m.weight": (70, 5), "other.weight": (3, 3)})
    assert made.changes_weight("m.weight") and not made.changes_weight("other.weight")
    whole = made.merge_weight_rows("m.weight", rows, Span(0, 70), "original")
    torch.testing.assert_close(whole, rows + B @ A)
    again = merger()
    parts = []
    for span in (Span(0, 1), Span(1, 67), Span(67, 70)):
        assert again.list_unused_tensors() == ["m.weight"]
        parts.append(again.merge_weight_rows("m.weight", rows[span.slice], span, "decoded"))
    assert torch.equal(torch.cat(parts), whole) and again.list_unused_tensors() == []
    assert again.compute_encoded_rows("m.weight", rows, Span(0, 70)) is rows


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({}, "adapts m, which the base does not have"),
        ({"m.weight": (71, 5)}, "of 70 rows and 5 columns, but the base's has 71 rows of 5"),
        ({"m.weight": (70, 4)}, "but the base's has 70 rows of 4; it belongs to another base"),
    ],
)
def test_another_base_is_refused(shapes: dict[str, tuple[int, int]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        merger().check_weight_shapes(shapes)


def test_rows_beyond_the_weight_are_refused() -> None:
    with pytest.raises(UserError, match="71 or more rows"):
        merger().merge_weight_rows("m.weight", torch.ones(1, 5), Span(70, 71), "original")


def test_zeros_cannot_hold_it() -> None:
    parts = AffineParts(*(torch.ones(70, 1) for _ in AffineParts._fields))
    with pytest.raises(UserError, match=r"LoHa .* only adapter\.kind qalora merges into zeros"):
        merger().merge_affine_parts("m.weight", parts, Span(0, 70))


def test_rows_of_the_change_alone() -> None:
    """As many columns as the base has, also where the change has no width of its own."""
    torch.manual_seed(0)
    delta = ProductDelta(torch.randn(7, 2), torch.randn(2, 5))
    merger = DeltaMerger("LoRA", {"m": delta})
    merger.check_weight_shapes({"m.weight": (7, 5)})
    rows = merger.compute_delta_rows("m.weight", Span(2, 6))
    assert torch.equal(rows, delta.add_to_rows(torch.zeros(4, 5), Span(2, 6)))
