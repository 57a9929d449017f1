import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_peft.data import pieces as module
from dist_peft.data.pieces import (
    DocumentPieces,
    count_piece_targets,
    split_by_epoch,
    split_into_windows,
    take_whole_documents,
)
from tests.support.data_files import documents

masks_of_documents = st.lists(
    st.lists(st.integers(0, 1), min_size=1, max_size=12), min_size=1, max_size=9
)


@given(st.lists(masks_of_documents, min_size=1, max_size=3), st.integers(1, 40), st.randoms())
def test_targets_of_any_order_and_any_blocks(
    masks: list[list[list[int]]], tokens: int, random: "np.random.Generator"
) -> None:
    """Against a loop; the sources' pieces are shuffled, so that a block has some of each."""
    sources = [documents(each) for each in masks]
    expected = [(s, d, sum(m[1:])) for s, each in enumerate(masks) for d, m in enumerate(each)]
    random.shuffle(expected)
    pieces = DocumentPieces(
        np.array([s for s, _, _ in expected], np.uint8),
        np.array([sources[s].offsets[d] for s, d, _ in expected], np.int64),
        np.array([len(masks[s][d]) for s, d, _ in expected], np.int32),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_TOKEN_BLOCK", tokens)
        found = count_piece_targets(sources, pieces)
    assert found.tolist() == [count for _, _, count in expected]


@given(masks_of_documents)
def test_whole_documents(masks: list[list[int]]) -> None:
    made = take_whole_documents(documents(masks))
    assert made.length.tolist() == [len(m) for m in masks]
    assert made.start.tolist() == np.cumsum([0, *map(len, masks)])[:-1].tolist()
    assert not made.source.any() and len(made) == len(masks)
    first = made.select_pieces(slice(0, 1))
    assert (len(first), first.length[0]) == (1, len(masks[0]))


def test_windows_of_a_document_longer_than_32_bits() -> None:
    """Lengths and offsets of 2^31 tokens and more do not wrap around."""
    long = DocumentPieces(np.zeros(1, np.uint8), np.array([5]), np.array([2**31 + 3]))
    windows = split_into_windows(long, 2**30)
    assert windows.start.tolist() == [5, 5 + 2**30, 5 + 2**31]
    assert windows.length.tolist() == [2**30, 2**30, 3]


def test_epochs_of_sources_with_different_numbers_of_variants() -> None:
    """Source 0 has three documents a record, cut into windows of 2; source 1 has one."""
    sources = [documents([[1] * 3] * 6), documents([[1] * 2] * 2)]
    cut = split_into_windows(take_whole_documents(sources[0]), 2)
    plain = take_whole_documents(sources[1])
    joined = DocumentPieces(
        np.repeat(np.array([0, 1], np.uint8), [len(cut), len(plain)]),
        np.concatenate([cut.start, plain.start]),
        np.concatenate([cut.length, plain.length]),
    )
    epochs = split_by_epoch(sources, joined, [3, 1])
    for number, pieces in enumerate(epochs):
        starts = [3 * number, 3 * number + 2, 9 + 3 * number, 9 + 3 * number + 2]
        assert pieces.start.tolist() == [*starts, 0, 2]
        assert pieces.source.tolist() == [0, 0, 0, 0, 1, 1]
    assert split_by_epoch(sources, joined, [1, 1]) == [joined]
