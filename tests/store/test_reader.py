import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dist_peft.core.errors import UserError
from dist_peft.core.span import Span, row_span
from dist_peft.store.index import SafetensorsIndex
from dist_peft.store.reader import RowReader
from tests.support.store_files import random_tensor, raw_bytes, tensors


def _reader(directory: Path, content: dict[str, Tensor]) -> RowReader:
    save_file(content, directory / "model.safetensors")
    return RowReader(SafetensorsIndex.open(directory))


@given(data=st.data(), content=tensors())
def test_random_spans_equal_the_librarys_slices(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, content: dict[str, Tensor]
) -> None:
    directory = tmp_path_factory.mktemp("model")
    expected_bytes = largest = 0
    with (
        _reader(directory, content) as reader,
        safe_open(directory / "model.safetensors", "pt") as library,
    ):
        for name in content:
            whole = library.get_tensor(name)
            assert raw_bytes(reader.read_rows(name)) == raw_bytes(whole)
            assert reader.read_rows(name).shape == whole.shape
            expected_bytes += 2 * whole.nbytes
            largest = max(largest, whole.nbytes)
            if whole.ndim:
                start = data.draw(st.integers(0, len(whole)))
                span = Span(start, data.draw(st.integers(start, len(whole))))
                part = reader.read_rows(name, span)
                assert (part.dtype, part.shape) == (whole.dtype, whole[span.slice].shape)
                assert raw_bytes(part) == raw_bytes(whole[span.slice])
                expected_bytes += part.nbytes
        assert reader.bytes_read == expected_bytes
        assert reader.largest_read == largest


def test_flat_rows_of_any_shape(tmp_path: Path) -> None:
    whole = random_tensor(torch.bfloat16, (3, 4, 6))
    with _reader(tmp_path, {"w": whole}) as reader:
        for span in (Span(0, 12), Span(2, 9), Span(5, 5)):
            part = reader.read_flat_rows("w", span)
            assert part.shape == (len(span), 6)
            assert raw_bytes(part) == raw_bytes(whole.flatten(0, 1)[span.slice])
        assert reader.bytes_read == (12 + 7) * 6 * 2
        with pytest.raises(ValueError, match="has no flat"):
            reader.read_flat_rows("w", Span(3, 13))


def test_ranks_read_disjoint_rows_that_cover_the_tensor(tmp_path: Path) -> None:
    whole = random_tensor(torch.bfloat16, (10, 6))
    parts, read = [], 0
    for rank in range(4):
        with _reader(tmp_path, {"w": whole}) as reader:
            parts.append(reader.read_rows("w", row_span(10, 4, rank)))
            assert reader.bytes_read == reader.largest_read == parts[-1].nbytes
            read += reader.bytes_read
    assert raw_bytes(torch.cat(parts)) == raw_bytes(whole)
    assert read == whole.nbytes


def test_the_system_is_asked_for_exactly_these_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, int]] = []
    preadv = os.preadv

    def spy(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        count = preadv(descriptor, buffers, offset)
        calls.append((offset, count))
        return count

    with _reader(tmp_path, {"w": torch.arange(12.0).reshape(6, 2)}) as reader:
        monkeypatch.setattr(os, "preadv", spy)
        rows = reader.read_rows("w", Span(2, 5))
        reader.read_rows("w", Span(6, 6))
    assert torch.equal(rows, torch.arange(4.0, 10.0).reshape(3, 2))
    assert calls == [(reader.index.find_tensor("w").start + 2 * 8, 3 * 8)]


def test_scalars_and_vectors(tmp_path: Path) -> None:
    with _reader(tmp_path, {"s": torch.tensor(7.0), "v": torch.arange(5)}) as reader:
        assert torch.equal(reader.read_rows("s"), torch.tensor(7.0))
        assert torch.equal(reader.read_rows("s", Span(0, 1)), torch.tensor(7.0))
        assert torch.equal(reader.read_rows("v", Span(1, 3)), torch.tensor([1, 2]))
        with pytest.raises(
            ValueError, match=r"tensor s of shape \(\) has no Span\(start=0, stop=0"
        ):
            reader.read_rows("s", Span(0, 0))


def test_a_result_is_the_callers_own_memory(tmp_path: Path) -> None:
    with _reader(tmp_path, {"w": torch.ones(2, 2)}) as reader:
        first = reader.read_rows("w")
        first.zero_()
        assert torch.equal(reader.read_rows("w"), torch.ones(2, 2))


def test_a_span_outside_the_tensor(tmp_path: Path) -> None:
    with _reader(tmp_path, {"w": torch.ones(2, 2)}) as reader:
        with pytest.raises(ValueError, match=r"tensor w of shape \(2, 2\) has no Span") as caught:
            reader.read_rows("w", Span(1, 3))
        assert not isinstance(caught.value, UserError)
        assert reader.bytes_read == 0


def test_an_unknown_name_shows_the_nearest(tmp_path: Path) -> None:
    with (
        _reader(tmp_path, {"lm_head.weight": torch.ones(2)}) as reader,
        pytest.raises(UserError, match=r"no tensor lm_head.wait in .*; nearest: lm_head.weight"),
    ):
        reader.read_rows("lm_head.wait")


def test_a_file_cut_off_while_reading(tmp_path: Path) -> None:
    with _reader(tmp_path, {"w": torch.ones(100)}) as reader:
        reader.read_rows("w", Span(0, 1))
        file = tmp_path / "model.safetensors"
        os.truncate(file, file.stat().st_size - 4)
        reader.read_rows("w", Span(0, 99))
        with pytest.raises(UserError, match="safetensors changed or was truncated while"):
            reader.read_rows("w")


def test_a_file_that_is_gone(tmp_path: Path) -> None:
    with _reader(tmp_path, {"w": torch.ones(3)}) as reader:
        (tmp_path / "model.safetensors").unlink()
        with pytest.raises(UserError, match=r"model.safetensors does not exist"):
            reader.read_rows("w")


def test_files_are_closed_at_the_end(tmp_path: Path) -> None:
    for i in range(40):
        save_file({str(i): torch.full((2,), float(i))}, tmp_path / f"{i:02d}.safetensors")
    before = len(os.listdir("/proc/self/fd"))
    with RowReader(SafetensorsIndex.open(tmp_path)) as reader:
        for _ in range(2):
            for i in range(40):
                assert torch.equal(reader.read_rows(str(i)), torch.full((2,), float(i)))
        assert len(os.listdir("/proc/self/fd")) - before <= 16
    assert len(os.listdir("/proc/self/fd")) == before


@given(data=st.data())
def test_columns_are_the_pieces_of_rows(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    whole = torch.arange(7 * 9, dtype=torch.int32).reshape(7, 9)
    a, b, c, d = (data.draw(st.integers(0, 7)) for _ in range(4))
    rows, columns = Span(min(a, b), max(a, b)), Span(min(c, d), max(c, d) + 2)
    with _reader(tmp_path_factory.mktemp("model"), {"w": whole}) as reader:
        part = reader.read_rows("w", rows, columns)
        assert torch.equal(part, whole[rows.slice, columns.slice])
        assert reader.bytes_read == reader.largest_read == part.nbytes
        gaps = max(0, len(rows) - 1) * (9 - len(columns)) * 4
        assert reader.bytes_skipped == (gaps if 0 < len(columns) < 9 else 0)
        assert torch.equal(reader.read_rows("w", columns=columns), whole[:, columns.slice])


def test_large_pieces_are_read_without_what_is_between(tmp_path: Path) -> None:
    whole = torch.arange(3 * 40_000, dtype=torch.int32).reshape(3, 40_000)
    with _reader(tmp_path, {"w": whole}) as reader:
        assert torch.equal(reader.read_rows("w", columns=Span(5, 20_005)), whole[:, 5:20_005])
        assert reader.bytes_skipped == 0


def test_columns_that_are_not_there(tmp_path: Path) -> None:
    with _reader(tmp_path, {"w": torch.zeros(3, 4), "v": torch.zeros(3)}) as reader:
        for name, columns in (("w", Span(0, 5)), ("v", Span(0, 1))):
            with pytest.raises(ValueError, match=f"tensor {name} .* no columns"):
                reader.read_rows(name, columns=columns)
