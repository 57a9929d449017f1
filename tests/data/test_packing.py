from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from dist_peft.data.packing import IGNORE, concatenate_documents, pack_documents


def pack_windows(lengths: Sequence[int] | NDArray[np.int64], capacity: int) -> list[list[int]]:
    """The documents of each sequence."""
    order, bounds = pack_documents(lengths, capacity)
    return [part.tolist() for part in np.split(order, bounds[1:-1])] if len(order) else []


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[int], int]:
    capacity = draw(st.integers(1, 60))
    return draw(st.lists(st.integers(1, capacity), max_size=80)), capacity


@given(problems())
def test_each_document_once_and_no_window_overfull(problem: tuple[list[int], int]) -> None:
    lengths, capacity = problem
    windows = pack_windows(lengths, capacity)
    assert sorted(d for w in windows for d in w) == list(range(len(lengths)))
    loads = [sum(lengths[d] for d in w) for w in windows]
    assert all(0 < load <= capacity for load in loads)
    # no two windows would fit into one, so more than half of all but one is filled
    if len(loads) > 1:
        assert sum(sorted(loads)[:2]) > capacity


@given(problems())
def test_order_is_that_of_the_documents(problem: tuple[list[int], int]) -> None:
    windows = pack_windows(*problem)
    assert windows == pack_windows(np.asarray(problem[0], dtype=np.int64), problem[1])
    assert all(w == sorted(w) for w in windows)
    assert [w[0] for w in windows] == sorted(w[0] for w in windows)


@given(problems())
def test_each_document_went_to_the_fullest_window(problem: tuple[list[int], int]) -> None:
    """Against best-fit decreasing done by looking at every window."""
    lengths, capacity = problem
    loads: list[int] = []
    for size in sorted(lengths, reverse=True):
        fitting = [load for load in loads if load + size <= capacity]
        if fitting:
            loads[loads.index(max(fitting))] += size
        else:
            loads.append(size)
    assert sorted(loads) == sorted(
        sum(lengths[d] for d in w) for w in pack_windows(lengths, capacity)
    )


def test_fill_of_typical_lengths_and_time() -> None:
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(5.5, 0.8, 50_000).astype(int), 1, 2048)
    windows = pack_windows(lengths, 2048)
    assert lengths.sum() / (len(windows) * 2048) > 0.99


@pytest.mark.parametrize("lengths", [[5], [0, 1], [-1]])
def test_impossible_lengths(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="do not fit sequences of 4"):
        pack_documents(lengths, 4)


def test_the_picture_in_the_module() -> None:
    ones = [np.ones(n, dtype=np.uint8) for n in (4, 3, 2)]
    documents = [np.arange(len(m), dtype=np.int32) + 10 * i for i, m in enumerate(ones)]
    tokens, labels, positions = concatenate_documents(list(zip(documents, ones, strict=True)))
    assert tokens.tolist() == [0, 1, 2, 3, 10, 11, 12, 20, 21]
    assert labels.tolist() == [1, 2, 3, IGNORE, 11, 12, IGNORE, 21, IGNORE]
    assert positions.tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 1]


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=9), min_size=1, max_size=6))
def test_labels_are_the_next_token_of_the_same_document(masks: list[list[bool]]) -> None:
    arrays = [np.asarray(m, dtype=np.uint8) for m in masks]
    total = iter(range(1000))
    documents = [np.asarray([next(total) for _ in m], dtype=np.int32) for m in masks]
    tokens, labels, positions = concatenate_documents(list(zip(documents, arrays, strict=True)))
    where = [(d, t) for d, mask in enumerate(masks) for t in range(len(mask))]
    assert len(tokens) == len(labels) == len(positions) == len(where)
    for i, (d, t) in enumerate(where):
        assert tokens[i] == documents[d][t]
        assert positions[i] == t
        counts = t + 1 < len(masks[d]) and masks[d][t + 1]
        assert labels[i] == (documents[d][t + 1] if counts else IGNORE)
