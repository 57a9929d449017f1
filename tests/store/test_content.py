"""``store.content``: a sum of hashes of rows, however they are read."""

import itertools
import tempfile
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from dist_peft.core.span import Span
from dist_peft.store.content import RowHashes, RowLayout, hash_rows
from dist_peft.store.format import TensorSpec
from dist_peft.store.index import SafetensorsIndex
from dist_peft.store.reader import RowReader

MASK = 2**64 - 1


def data_of(rows: int, row_bytes: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (rows * row_bytes,), dtype=torch.uint8, generator=generator)


def layout_of(rows: int, row_bytes: int) -> RowLayout:
    return RowLayout.of_tensor(TensorSpec("t", torch.uint8, (rows, row_bytes)))


def hash_of(data: torch.Tensor, row_bytes: int) -> int:
    return hash_rows(data, layout_of(len(data) // row_bytes, row_bytes))


@pytest.mark.parametrize(
    ("row_bytes", "block_rows"),
    [(1, 65536), (2, 32768), (8192, 8), (10240, 4), (22016, 2), (65536, 1), (70000, 1), (0, 65536)],
)
def test_blocks_fit_into_64_kib_or_are_one_row(row_bytes: int, block_rows: int) -> None:
    layout = layout_of(9, row_bytes)
    assert layout.block_rows == block_rows
    assert layout.block_of_row(8) == Span(8 // block_rows * block_rows, 9)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 70),
    st.sampled_from([1, 2, 7, 250, 9000, 30000, 70000]),
    st.lists(st.integers(0, 70), max_size=5),
    st.randoms(),
)
def test_ranges_in_any_order_and_on_any_rank_add_up_to_the_whole(
    rows: int, row_bytes: int, cuts: list[int], random: Random
) -> None:
    """Ranks have a reader each and no rows in common; a rank reads its own in any order."""
    with tempfile.TemporaryDirectory() as directory:
        data = data_of(rows, row_bytes)
        save_file({"t": data.view(rows, row_bytes)}, Path(directory) / "model.safetensors")
        index = SafetensorsIndex.open(Path(directory))
        ends = [0, *sorted(min(cut, rows) for cut in cuts), rows]
        spans = [Span(a, b) for a, b in itertools.pairwise(ends)]
        random.shuffle(spans)
        total, counted, again = 0, 0, 0
        for mine in (spans[:2], spans[2:]):
            hashes = RowHashes([index.find_tensor("t")])
            with RowReader(index, hashes) as reader:
                for span in mine:
                    read = reader.read_rows("t", span)
                    assert torch.equal(read, data.view(rows, row_bytes)[span.slice])
                again += reader.bytes_read_again
            if known := hashes.sums.get("t"):
                total, counted = total + known.total, counted + known.num_hashed_rows
        assert counted == rows and total & MASK == hash_of(data, row_bytes)
        assert again <= 2 * len(spans) * min(2**16, rows * row_bytes)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([2, 300, 20000, 40000]), st.data())
def test_any_byte_and_any_exchange_of_rows_is_seen(row_bytes: int, draw: st.DataObject) -> None:
    data = data_of(9, row_bytes)
    whole = hash_of(data, row_bytes)
    changed = data.clone()
    changed[draw.draw(st.integers(0, len(data) - 1))] ^= draw.draw(st.integers(1, 255))
    assert hash_of(changed, row_bytes) != whole
    rows = data.view(9, row_bytes)
    order = draw.draw(st.permutations(range(9)))
    moved = rows[order].contiguous()
    assert (hash_of(moved.view(-1), row_bytes) == whole) == torch.equal(moved, rows)


def test_exchanged_blocks_and_equal_blocks_count() -> None:
    """Blocks of equal bytes, whose hashes would cancel in a sum without their places."""
    layout = layout_of(24, 8192)
    assert layout.block_rows == 8
    one, two = data_of(8, 8192, seed=1), data_of(8, 8192, seed=2)
    orders = itertools.product((one, two), repeat=3)
    assert len({hash_rows(torch.cat(order), layout) for order in orders}) == 8


@pytest.mark.parametrize("where", ["own rows", "rows of the other rank in the same block"])
def test_every_rank_compares_the_blocks_that_it_shares(tmp_path: Path, where: str) -> None:
    """Hosts have copies of the file; a byte differs in the one that the second rank reads."""
    totals = []
    for damaged in (False, True):
        total = 0
        for rank, mine in enumerate((Span(0, 11), Span(11, 20))):
            data = data_of(20, 8192).view(20, 8192)
            if damaged and rank == 1:
                data[12 if where == "own rows" else 9, 5] ^= 1
            folder = tmp_path / f"{damaged}{rank}"
            folder.mkdir()
            save_file({"t": data}, folder / "model.safetensors")
            index = SafetensorsIndex.open(folder)
            hashes = RowHashes([index.find_tensor("t")])
            with RowReader(index, hashes) as reader:
                reader.read_rows("t", mine)
            total += hashes.sums["t"].total
        totals.append(total & MASK)
    assert totals[0] != totals[1]


@pytest.mark.parametrize("row_bytes", [7, 250, 1031])
def test_every_bit_counts(row_bytes: int) -> None:
    """Each of the first row's bits alone: none leaves the hash, and no two give the same one."""
    data = data_of(3, row_bytes, seed=row_bytes)
    found = {hash_of(data, row_bytes)}
    for bit in range(8 * row_bytes):
        data[bit // 8] ^= 1 << bit % 8
        found.add(hash_of(data, row_bytes))
        data[bit // 8] ^= 1 << bit % 8
    assert len(found) == 1 + 8 * row_bytes


@pytest.mark.parametrize("row_bytes", [16, 88, 512, 4096])
def test_every_exchange_of_words_in_a_row_is_seen(row_bytes: int) -> None:
    """Neighbours and words at the distance of XXH3's lanes, stripes and blocks."""
    words = data_of(2, row_bytes, seed=1).view(torch.int64)
    whole = hash_of(words.view(torch.uint8), row_bytes)
    count = row_bytes // 8
    for first, distance in itertools.product(range(count), (1, 2, 8, 16, 128)):
        if first + distance < count:
            swapped = words.clone()
            swapped[[first, first + distance]] = words[[first + distance, first]]
            assert hash_of(swapped.view(torch.uint8), row_bytes) != whole


def test_hashes_are_the_same_on_every_machine() -> None:
    """Checkpoints and adapters keep them."""
    data = torch.arange(30 * 9000).remainder(251).to(torch.uint8)
    assert f"{hash_of(data, 9000):016x}" == "f1c67a65211b9467"
    assert f"{hash_of(data[:6000], 6):016x}" == "dc4de7a8614b8189"
    assert (
        f"{hash_rows(data, RowLayout(30, 9000)):016x}" == "cfc635654e795111"
    )  # packed rows: one by one
    assert (
        RowHashes([TensorSpec("t", torch.uint8, (2, 3))]).describe_tensor("t", 5)
        == "2:54a7716e8477ac39"
    )


def test_rows_count_once_they_are_all_read() -> None:
    """Panel by panel into memory that was hashed in no part before, over rows known already."""
    row_bytes = 30000
    content = data_of(20, row_bytes).view(20, row_bytes)

    def read_block(span: Span) -> memoryview:
        blocks.append(span)
        return content[span.slice].reshape(-1).numpy().data

    blocks: list[Span] = []
    hashes = RowHashes([TensorSpec("t", torch.uint8, (20, row_bytes))])
    rows = hashes.begin_hashing("t", 6, known := content[6:9].clone().view(-1), read_block)
    assert rows is not None
    rows.hash_up_to(len(known))
    rows.finish_hashing()
    before = hashes.sums["t"].total
    assert hashes.sums["t"].spans == [Span(6, 9)] and blocks == [Span(8, 10)]
    data = torch.zeros(11 * row_bytes, dtype=torch.uint8)
    rows = hashes.begin_hashing("t", 5, data, read_block)
    assert rows is not None
    for begin, end in itertools.pairwise((0, 1, 4, 4, 11)):
        data.view(11, row_bytes)[begin:end] = content[5 + begin : 5 + end]
        rows.hash_up_to(end * row_bytes)
    assert hashes.sums["t"].total == before  # a read that fails adds nothing
    rows.finish_hashing()
    assert hashes.sums["t"].spans == [Span(5, 16)]
    assert hashes.begin_hashing("t", 5, data[: 4 * row_bytes], read_block) is None
    assert hashes.begin_hashing("other", 0, data, read_block) is None
    for first, stop in ((0, 5), (16, 20)):
        rest = content[first:stop].clone().view(-1)
        rows = hashes.begin_hashing("t", first, rest, read_block)
        assert rows is not None
        rows.hash_up_to(len(rest))
        rows.finish_hashing()
    assert hashes.sums["t"].total == hash_of(content.view(-1), row_bytes)
    assert set(blocks) == {Span(8, 10), Span(4, 6)} and hashes.sums["t"].is_complete


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=6))
def test_rows_read_again_count_once(reads: list[tuple[int, int]]) -> None:
    data = data_of(12, 20000)
    hashes, seen = RowHashes([], [TensorSpec("t", torch.float32, (12, 40000))]), set[int]()
    for a, b in [*reads, (0, 12)]:
        a, b = min(a, b), max(a, b)
        hashes.add_packed_rows("t", a, data.view(12, 20000)[a:b])
        seen |= set(range(a, b))
        known = hashes.sums.get("t")
        assert (known.num_hashed_rows if known else 0) == len(seen)
        assert bool(known and known.is_complete) == (len(seen) == 12)
    assert hashes.sums["t"].total == hash_rows(data, RowLayout(12, 20000))


def test_type_and_shape_are_part_of_it() -> None:
    specs = [
        TensorSpec("t", torch.float32, (4, 8)),
        TensorSpec("t", torch.int32, (4, 8)),
        TensorSpec("t", torch.float32, (2, 2, 8)),
    ]
    assert len({RowHashes([spec]).describe_tensor("t", 5) for spec in specs}) == 3


@pytest.mark.parametrize(
    "shape", [(), (5,), (6, 3), (4, 3, 50), (2, 1, 4), (0, 3), (3, 0)], ids=str
)
def test_reader_hashes_whole_rows(tmp_path: Path, shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape)
    save_file({"t": tensor, "other": torch.ones(2)}, tmp_path / "model.safetensors")
    index = SafetensorsIndex.open(tmp_path)
    info = index.find_tensor("t")
    rows = RowLayout.of_tensor(info).rows
    expected = hash_rows(tensor.reshape(-1).view(torch.uint8), RowLayout.of_tensor(info))
    for step in (1, 2, 100):
        hashes = RowHashes([info])
        with RowReader(index, hashes) as reader:
            reader.read_rows("other")
            for span in reversed(list(Span(0, info.num_rows).split_into_chunks(step))):
                reader.read_rows("t", span)
        if not info.num_bytes:
            assert not hashes.sums
            continue
        assert hashes.sums.keys() == {"t"}
        assert hashes.sums["t"].is_complete and hashes.sums["t"].total == expected
    if len(shape) > 1 and info.num_bytes:
        hashes = RowHashes([info])
        with RowReader(index, hashes) as reader:
            for span in Span(0, rows).split_into_chunks(5):
                reader.read_flat_rows("t", span)
            reader.read_rows("t", columns=Span(0, shape[1] - 1)) if len(shape) == 2 else None
        assert hashes.sums["t"].total == expected


def test_packed_rows_and_their_parts_have_one_name(tmp_path: Path) -> None:
    """bitsandbytes calls its blob as the weight is called; only the packed rows count."""
    packed = data_of(6, 20).view(6, 20)
    hashes = RowHashes([], [TensorSpec("a.weight", torch.float32, (6, 40))])
    assert (
        hashes.begin_hashing("a.weight", 0, packed.flatten(), lambda span: memoryview(b"")) is None
    )
    hashes.add_packed_rows("a.weight", 2, packed[2:])
    hashes.add_packed_rows("a.weight", 0, packed[:2])
    assert hashes.sums["a.weight"].total == hash_rows(packed.flatten(), RowLayout(6, 20))
    assert hashes.count_rows("a.weight") == 6
