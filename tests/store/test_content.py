"""``store.content``: a sum of hashes of rows, however they are read."""

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from dist_peft.core.span import Span
from dist_peft.store.content import RowHashes, flat_row_layout, hash_rows
from dist_peft.store.format import TensorSpec
from dist_peft.store.index import SafetensorsIndex
from dist_peft.store.reader import RowReader

MASK = 2**64 - 1


def data_of(rows: int, row_bytes: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (rows * row_bytes,), dtype=torch.uint8, generator=generator)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 40),
    st.sampled_from([1, 2, 7, 8, 16, 95, 96, 97, 256, 700]),
    st.lists(st.integers(0, 40), max_size=5),
    st.integers(0, 2**40),
)
def test_parts_add_up_to_the_whole(rows: int, row_bytes: int, cuts: list[int], first: int) -> None:
    data = data_of(rows, row_bytes)
    ends = [0, *sorted(min(cut, rows) for cut in cuts), rows]
    parts = [
        hash_rows(data[a * row_bytes : b * row_bytes], first + a, row_bytes)
        for a, b in itertools.pairwise(ends)
    ]
    assert sum(parts) & MASK == hash_rows(data, first, row_bytes)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([2, 8, 40, 96, 300]), st.data())
def test_any_byte_and_any_exchange_of_rows_is_seen(row_bytes: int, draw: st.DataObject) -> None:
    data = data_of(9, row_bytes)
    whole = hash_rows(data, 0, row_bytes)
    changed = data.clone()
    changed[draw.draw(st.integers(0, len(data) - 1))] ^= draw.draw(st.integers(1, 255))
    assert hash_rows(changed, 0, row_bytes) != whole
    rows = data.view(9, row_bytes)
    order = draw.draw(st.permutations(range(9)))
    moved = rows[order].contiguous()
    assert (hash_rows(moved.view(-1), 0, row_bytes) == whole) == torch.equal(moved, rows)


@pytest.mark.parametrize("row_bytes", [7, 96, 250, 1031])
def test_every_bit_counts(row_bytes: int) -> None:
    """Each of the first row's bits alone: none leaves the hash, and no two give the same one."""
    data = data_of(3, row_bytes, seed=row_bytes)
    found = {hash_rows(data, 5, row_bytes)}
    for bit in range(8 * row_bytes):
        data[bit // 8] ^= 1 << bit % 8
        found.add(hash_rows(data, 5, row_bytes))
        data[bit // 8] ^= 1 << bit % 8
    assert len(found) == 1 + 8 * row_bytes


@pytest.mark.parametrize("row_bytes", [16, 88, 96, 512, 4096])
def test_every_exchange_of_words_in_a_row_is_seen(row_bytes: int) -> None:
    """Neighbours and words at the distance of XXH3's lanes, stripes and blocks."""
    words = data_of(2, row_bytes, seed=1).view(torch.int64)
    whole = hash_rows(words.view(torch.uint8), 0, row_bytes)
    count = row_bytes // 8
    for first, distance in itertools.product(range(count), (1, 2, 8, 16, 128)):
        if first + distance < count:
            swapped = words.clone()
            swapped[[first, first + distance]] = words[[first + distance, first]]
            assert hash_rows(swapped.view(torch.uint8), 0, row_bytes) != whole


def test_hashes_are_the_same_on_every_machine() -> None:
    """Checkpoints and adapters keep them."""
    data = torch.arange(3 * 1000).remainder(251).to(torch.uint8)
    assert f"{hash_rows(data, 2, 1000):016x}" == "0c4f5b84ed6948ef"
    assert f"{hash_rows(data, 2, 6):016x}" == "dfa3955facef53ef"


@pytest.mark.parametrize("row_bytes", [40, 3000])
def test_rows_count_once_they_are_all_read(row_bytes: int) -> None:
    """Panel by panel into memory that was hashed in no part before, over rows known already."""
    content = data_of(11, row_bytes)
    hashes = RowHashes([TensorSpec("t", torch.uint8, (20, row_bytes))])
    hashes.add_plain_rows("t", 6, content[2 * row_bytes : 5 * row_bytes])
    before = hashes.sums["t"].total
    data = torch.zeros_like(content)
    rows = hashes.begin_hashing("t", 4, data)
    assert rows is not None
    for begin, end in itertools.pairwise((0, 1, 4, 4, 11)):
        part = slice(begin * row_bytes, end * row_bytes)
        data[part] = content[part]
        rows.hash_up_to(end * row_bytes)
    assert hashes.sums["t"].total == before  # a read that fails adds nothing
    rows.finish_hashing()
    assert hashes.sums["t"].spans == [Span(4, 15)]
    assert hashes.sums["t"].total == hash_rows(content, 4, row_bytes)
    assert hashes.begin_hashing("t", 5, data[: 4 * row_bytes]) is None
    assert hashes.begin_hashing("other", 0, data) is None


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=6))
def test_rows_read_again_count_once(reads: list[tuple[int, int]]) -> None:
    spec = TensorSpec("t", torch.uint8, (12, 100))
    data = data_of(12, 100)
    hashes, seen = RowHashes([spec]), set[int]()
    for a, b in reads:
        a, b = min(a, b), max(a, b)
        hashes.add_plain_rows("t", a, data[a * 100 : b * 100])
        seen |= set(range(a, b))
    expected = sum(hash_rows(data[r * 100 : r * 100 + 100], r, 100) for r in seen) & MASK
    known = hashes.sums.get("t")
    assert (known.total if known else 0) == expected
    assert (known.num_hashed_rows if known else 0) == len(seen)
    assert bool(known and known.is_complete) == (len(seen) == 12)


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
    rows, row_bytes = flat_row_layout(info)
    expected = hash_rows(tensor.reshape(-1).view(torch.uint8), 0, row_bytes) if rows else 0
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
    hashes.add_plain_rows("a.weight", 0, packed.flatten())
    assert not hashes.sums
    hashes.add_packed_rows("a.weight", 2, packed[2:])
    hashes.add_packed_rows("a.weight", 0, packed[:2])
    assert hashes.sums["a.weight"].total == hash_rows(packed.flatten(), 0, 20)
