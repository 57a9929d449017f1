"""Where virtual tokens go, against a walk over the tokens."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dist_peft.adapters.virtual_tokens.insertion import TokenInsertion


@st.composite
def rows_of_documents(draw: st.DrawFn) -> list[list[int]]:
    """One to three rows of 10 tokens, each cut into documents of at least one token."""
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        left, lengths = 10, []
        while left:
            lengths.append(draw(st.integers(1, left)))
            left -= lengths[-1]
        rows.append(lengths)
    return rows


def widened_by_loop(lengths: list[int], row: Tensor, virtual: Tensor) -> tuple[list, list[int]]:
    wide: list[list[float]] = []
    positions: list[int] = []
    start = 0
    for length in lengths:
        wide += virtual.tolist() + row[start : start + length].tolist()
        positions += range(len(virtual) + length)
        start += length
    return wide, positions


@settings(deadline=None)
@given(rows_of_documents(), st.integers(1, 4))
def test_before_documents_is_what_a_loop_says(rows: list[list[int]], count: int) -> None:
    positions = torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in rows])
    embeddings = torch.randn(len(rows), 10, 2)
    virtual = torch.randn(count, 2)
    insertion = TokenInsertion.insert_before_documents(positions, count)
    wide = insertion.insert_embeddings(embeddings, virtual)
    assert torch.equal(insertion.remove_inserted_states(wide), embeddings)
    most = max(len(lengths) for lengths in rows)
    assert wide.shape[1] == 10 + most * count
    for b, lengths in enumerate(rows):
        expected, places = widened_by_loop(lengths, embeddings[b], virtual)
        assert wide[b, : len(expected)].tolist() == expected
        assert insertion.position_ids[b, : len(places)].tolist() == places
        # what fills the row up is a document of its own
        rest = insertion.position_ids[b, len(places) :].tolist()
        assert rest == list(range(len(rest)))


def test_before_rows_stands_in_front_of_padding() -> None:
    positions = torch.tensor([[1, 1, 0, 1], [0, 1, 2, 3]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    insertion = TokenInsertion.insert_before_sequences(positions, 2)
    assert insertion.position_ids.tolist() == [[0, 1, 3, 3, 2, 3], [0, 1, 2, 3, 4, 5]]
    assert insertion.widen_attention_mask(mask).tolist() == [[1, 1, 0, 0, 1, 1], [1] * 6]


def test_gradients_reach_virtual_tokens_only_through_their_copies() -> None:
    virtual = torch.ones(2, 3, requires_grad=True)
    positions = torch.tensor([[0, 1, 0, 1]])
    wide = TokenInsertion.insert_before_documents(positions, 2).insert_embeddings(
        torch.zeros(1, 4, 3), virtual
    )
    wide.sum().backward()
    assert torch.equal(virtual.grad, torch.full((2, 3), 2.0))  # two documents
