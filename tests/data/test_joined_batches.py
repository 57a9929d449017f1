import torch

from dist_peft.data.joined_batches import join_batches
from dist_peft.data.loader import Batch
from dist_peft.data.packing import IGNORE


def make_batch(lengths: list[int], width: int, first: int) -> Batch:
    """Sequences of one document and its padding, as ``TokenLoader`` makes them."""
    ids = torch.zeros(len(lengths), width, dtype=torch.long)
    labels = torch.full_like(ids, IGNORE)
    positions = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.arange(length) + 10 * (first + row) + 1
        labels[row, :length] = 7
        positions[row, :length] = torch.arange(length)
        positions[row, length:] = torch.arange(width - length)
    return Batch(ids, labels, positions, torch.arange(len(lengths)) + first, is_packed=False)


def test_widened_sequences_are_those_of_a_wider_batch() -> None:
    narrow, wide = make_batch([4, 2], 4, 0), make_batch([7], 8, 2)
    joined, expected = join_batches([narrow, wide]), make_batch([4, 2, 7], 8, 0)
    for name in ("input_ids", "labels", "position_ids", "sample_ids"):
        assert torch.equal(getattr(joined, name), getattr(expected, name)), name
    assert not joined.is_packed


def test_batches_of_one_width_are_unchanged() -> None:
    batch = make_batch([3, 5], 5, 0)
    batch = Batch(*list(vars(batch).values())[:4], is_packed=True)
    joined = join_batches([batch, batch])
    assert joined.is_packed
    assert torch.equal(joined.input_ids, batch.input_ids.repeat(2, 1))
