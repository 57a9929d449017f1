"""Sparsities and the choice of weights: what parses, ties, and thresholds over ranks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dist_peft.quant.sparsity import (
    Sparsity,
    find_kth_smallest,
    select_by_threshold,
    select_in_groups,
    select_in_rows,
)


@pytest.mark.parametrize(
    ("text", "share", "pruned", "shown"),
    [("0.5", 0.5, 0, "0.5"), ("2:4", 0.5, 2, "2:4"), ("1:4", 0.75, 3, "1:4"), ("5e-1", 0.5, 0, "")],
)
def test_parsed(text: str, share: float, pruned: int, shown: str) -> None:
    found = Sparsity.parse(text)
    assert (found.share, found.pruned) == (share, pruned)
    assert str(found) == (shown or "0.5") and Sparsity.parse(str(found)) == found


@settings(deadline=None, max_examples=60)
@given(st.text("0123456789:.-+einfa ", max_size=8))
def test_any_text_parses_to_a_sparsity_or_is_refused(text: str) -> None:
    try:
        found = Sparsity.parse(text)
    except ValueError:
        return
    assert 0 < found.share < 1 and 0 <= found.pruned <= max(0, found.group - 1)


@pytest.mark.parametrize("text", ["0", "1", "50", "nan", "4:4", "0:4", "5:4", "2:4:8", "2:9999"])
def test_refused(text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Sparsity.parse(text)


def test_rows_and_groups() -> None:
    scores = torch.tensor([[3.0, 1.0, 1.0, 0.0], [5.0, 6.0, 7.0, 4.0]])
    rows = [[False, True, False, True], [True, False, False, True]]
    assert select_in_rows(scores, 2).tolist() == rows  # of the equal ones the first
    assert select_in_groups(scores, Sparsity.parse("2:4")).tolist() == rows
    pairs = select_in_groups(scores, Sparsity.parse("1:2"))
    assert pairs.tolist() == [[False, True, False, True], [True, False, False, True]]


@settings(deadline=None, max_examples=60)
@given(data=st.data(), cut=st.integers(0, 12))
def test_threshold_is_that_of_the_sorted_whole(data: st.DataObject, cut: int) -> None:
    number = st.sampled_from([0.0, 1e-40, 1e-3, 0.5, 0.50000006, 1.0, 3e38])
    values = torch.tensor(data.draw(st.lists(number, min_size=12, max_size=12)))
    k = data.draw(st.integers(1, 12))
    parts = [values[:cut], values[cut:]]
    wanted = values.sort().values[k - 1]
    assert torch.equal(find_kth_smallest(values, k, lambda own: own), wanted)
    find_on_two_ranks(parts, k, wanted)


def find_on_two_ranks(parts: list[Tensor], k: int, wanted: Tensor) -> None:
    bits = [part.view(torch.int32) for part in parts]
    calls = iter(("high", "low"))

    def reduce(own: Tensor) -> Tensor:
        if next(calls) == "high":
            return own + torch.bincount(bits[1] >> 16, minlength=2**16)
        inside = bits[1][(bits[1] >> 16) == (wanted.view(torch.int32) >> 16)]
        return own + torch.bincount(inside & 0xFFFF, minlength=2**16)

    assert torch.equal(find_kth_smallest(parts[0], k, reduce), wanted)


def test_ties_at_the_threshold_go_together() -> None:
    scores = torch.tensor([[1.0, 2.0], [2.0, 3.0]])
    assert select_by_threshold(scores, 2, lambda own: own).tolist() == [[True, True], [True, False]]
    assert not select_by_threshold(scores, 0, lambda own: own).any()
