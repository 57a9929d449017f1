import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_peft.data.documents import SequenceSet
from dist_peft.data.loader import Batch, Loader, TokenLoader, count_micro_batches
from dist_peft.data.packing import IGNORE
from dist_peft.data.pieces import take_whole_documents
from tests.support.data_files import documents

PAD = 999_999


def row_set(lengths: list[int], *, seq_len: int = 16, packed: bool = False) -> SequenceSet:
    """Documents of 2..seq_len tokens; the first half of each is prompt."""
    made = documents([[int(2 * t >= n) for t in range(n)] for n in lengths])
    return SequenceSet([made], [take_whole_documents(made)], seq_len=seq_len, packed=packed)


def loader(
    rows: SequenceSet, rank: int = 0, world_size: int = 1, **changes: int | bool
) -> Loader[Batch]:
    arguments = {
        "global_batch": 4,
        "micro_batch": 2,
        "seed": 1,
        "shuffle": True,
        "seq_len": rows.seq_len,
        "pad_id": PAD,
        **changes,
    }
    return TokenLoader(rows, data_rank=rank, data_size=world_size, **arguments)  # type: ignore[arg-type]


def ids(batches: list[Batch]) -> list[int]:
    return [i for batch in batches for i in batch.sample_ids.tolist()]


def interleaved(shares: list[list[Batch]]) -> list[Batch]:
    """Rank 0's first, rank 1's first, ..., rank 0's second, ...; without filler batches."""
    return [b for turn in zip(*shares, strict=True) for b in turn if ids([b]) != [-1]]


def equal(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(getattr(x, f), getattr(y, f))
        for x, y in zip(a, b, strict=True)
        for f in ("input_ids", "labels", "position_ids", "sample_ids")
    )


def check_batch(batch: Batch, rows: SequenceSet) -> None:
    """Every row of the batch holds its row of the set, and padding that teaches nothing."""
    count, width = batch.input_ids.shape
    assert batch.labels.shape == batch.position_ids.shape == (count, width)
    longest = 1
    for b, sample in enumerate(batch.sample_ids.tolist()):
        length = 0
        if sample != -1:
            for mine, theirs in zip(
                (batch.input_ids, batch.labels, batch.position_ids),
                rows.get_sequence(sample),
                strict=True,
            ):
                length = len(theirs)
                assert torch.equal(mine[b, :length], theirs)
        longest = max(longest, length)
        assert (batch.input_ids[b, length:] == PAD).all()
        assert (batch.labels[b, length:] == IGNORE).all()
        assert torch.equal(batch.position_ids[b, length:], torch.arange(width - length))
    expected = rows.seq_len if rows.packed else min(-(-longest // 8) * 8, rows.seq_len)
    assert width == expected


@st.composite
def runs(draw: st.DrawFn) -> tuple[SequenceSet, dict[str, int | bool], int]:
    lengths = draw(st.lists(st.integers(2, 16), min_size=1, max_size=20))
    rows = row_set(lengths, packed=draw(st.booleans()))
    arguments: dict[str, int | bool] = {
        "global_batch": draw(st.integers(1, 9)),
        "micro_batch": draw(st.integers(1, 4)),
        "seed": draw(st.integers(0, 3)),
        "shuffle": draw(st.booleans()),
    }
    return rows, arguments, draw(st.integers(0, 7))


@settings(deadline=None)
@given(runs(), st.integers(1, 4))
def test_any_world_size_serves_the_same_step(
    run: tuple[SequenceSet, dict[str, int | bool], int], world_size: int
) -> None:
    rows, arguments, step = run
    alone, targets = loader(rows, **arguments).load_step(step)
    shares = [loader(rows, r, world_size, **arguments).load_step(step) for r in range(world_size)]
    assert equal(interleaved([batches for batches, _ in shares]), alone)
    assert {t for _, t in shares} == {targets}
    counted = sum(int((b.labels != IGNORE).sum()) for batches, _ in shares for b in batches)
    assert counted == targets > 0
    own = [sum(int((b.labels != IGNORE).sum()) for b in batches) for batches, _ in shares]
    assert loader(rows, 0, world_size, **arguments).count_share_targets(step) == own
    assert len({len(batches) for batches, _ in shares}) == 1
    sizes = [len(b.sample_ids) for b in alone]
    assert max(sizes) <= arguments["micro_batch"] and max(sizes) - min(sizes) <= 1
    assert len(sizes) == count_micro_batches(sum(sizes), int(arguments["micro_batch"]))
    for batches, _ in shares:
        for batch in batches:
            check_batch(batch, rows)


@settings(deadline=None)
@given(runs(), st.integers(1, 4))
def test_evaluation_serves_each_row_once_in_order(
    run: tuple[SequenceSet, dict[str, int | bool], int], world_size: int
) -> None:
    rows, arguments, _ = run
    alone = loader(rows, **arguments).load_all_sequential()
    assert ids(alone) == list(range(len(rows)))
    shares = [
        loader(rows, r, world_size, **arguments).load_all_sequential() for r in range(world_size)
    ]
    assert equal(interleaved(shares), alone)
    assert len({len(batches) for batches in shares}) == 1
    for batches in shares:
        for batch in batches:
            check_batch(batch, rows)


@settings(deadline=None)
@given(runs())
def test_a_step_does_not_depend_on_the_steps_before(
    run: tuple[SequenceSet, dict[str, int | bool], int],
) -> None:
    rows, arguments, step = run
    going = loader(rows, **arguments)
    for before in range(step):
        going.load_step(before)
    batches, targets = going.load_step(step)
    resumed, resumed_targets = loader(rows, **arguments).load_step(step)
    assert equal(batches, resumed)
    assert targets == resumed_targets


@settings(deadline=None)
@given(runs())
def test_every_epoch_serves_every_row_once(
    run: tuple[SequenceSet, dict[str, int | bool], int],
) -> None:
    rows, arguments, _ = run
    made = loader(rows, **arguments)
    count, size = 3 * made.steps_per_epoch, len(rows)
    served = [i for s in range(count) for i in ids(made.load_step(s)[0])]
    for epoch in range(3):
        assert sorted(served[epoch * size : (epoch + 1) * size]) == list(range(size))
    assert (made.steps_per_epoch - 1) * int(arguments["global_batch"]) < size
    assert made.steps_per_epoch * int(arguments["global_batch"]) >= size


@pytest.mark.parametrize(
    ("global_batch", "micro_batch", "ranks", "expected"),
    [
        (7, 2, 2, [[[0, 1], [4, 5]], [[2, 3], [6]]]),
        (7, 2, 3, [[[0, 1], [6]], [[2, 3], [-1]], [[4, 5], [-1]]]),
        (6, 4, 3, [[[0, 1, 2]], [[3, 4, 5]], [[-1]]]),
        (7, 4, 1, [[[0, 1, 2, 3], [4, 5, 6]]]),
        (3, 8, 2, [[[0, 1, 2]], [[-1]]]),
    ],
)
def test_whole_micro_batches_are_dealt_in_turn(
    global_batch: int, micro_batch: int, ranks: int, expected: list[list[list[int]]]
) -> None:
    rows = row_set([4] * 8)
    sizes = {"global_batch": global_batch, "micro_batch": micro_batch, "shuffle": False}
    shares = [loader(rows, rank, ranks, **sizes).load_step(0)[0] for rank in range(ranks)]
    assert [[b.sample_ids.tolist() for b in share] for share in shares] == expected


def test_more_ranks_than_rows_get_filler() -> None:
    rows = row_set([4, 6, 8], packed=False)
    batches, targets = loader(rows, rank=3, world_size=4, global_batch=2).load_step(0)
    assert ids(batches) == [-1]
    assert batches[0].input_ids.shape == (1, 8)
    assert targets > 0
    check_batch(batches[0], rows)
    packed = row_set([4, 6, 8], packed=True)
    assert loader(packed, rank=3, world_size=4).load_all_sequential()[0].input_ids.shape == (1, 16)


def test_width_of_unpacked_batches_never_exceeds_the_window() -> None:
    rows = row_set([13, 9], seq_len=13)
    (batch,) = loader(rows).load_all_sequential()
    assert batch.input_ids.shape == (2, 13)


def test_impossible_arguments() -> None:
    rows = row_set([4, 5])
    with pytest.raises(ValueError, match="rank 2 of 2"):
        loader(rows, rank=2, world_size=2)
    with pytest.raises(ValueError, match="batch 0/2"):
        loader(rows, global_batch=0)
    with pytest.raises(ValueError, match="seq_len 8 is below that of the data set, 16"):
        loader(rows, seq_len=8)
    with pytest.raises(IndexError):
        loader(rows).load_step(-1)
