"""Fields of packed rows and the chunked encoder."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from dist_peft.quant import packed_rows as rows
from dist_peft.quant.packed_rows import (
    align_to_4_bytes,
    check_finite_statistics,
    check_float_weight,
    check_packed_rows,
    divide_exactly,
    list_row_chunks,
    quantize_in_groups,
    read_packed_field,
)

CPU = torch.device("cpu")


def test_align4() -> None:
    assert [align_to_4_bytes(n) for n in range(9)] == [0, 4, 4, 4, 4, 8, 8, 8, 8]


def test_chunks_cover_all_rows_and_are_bounded() -> None:
    chunks = list_row_chunks(1000, 4096, CPU)
    assert [i for span in chunks for i in range(span.start, span.stop)] == list(range(1000))
    assert max(len(span) for span in chunks) * 4096 <= rows.CHUNK_ELEMENTS
    assert [len(span) for span in list_row_chunks(3, 2**22, CPU)] == [1, 1, 1]
    assert list_row_chunks(0, 64, CPU) == []


def test_fields_lie_side_by_side_and_the_rest_is_zero() -> None:
    weight = torch.arange(40.0).view(2, 20)

    def encode(groups: Tensor, first_row: int) -> Sequence[Tensor]:
        assert groups.shape == (2, 3, 8)
        assert groups[:, 2, 4:].eq(0).all(), "rows are zero-padded to whole groups"
        return groups.amax(-1), torch.full((2, 1), 7, dtype=torch.uint8)

    packed = quantize_in_groups(weight, 8, 16, encode)
    assert packed.shape == (2, 16)
    assert read_packed_field(packed, 0, 3, torch.float32).tolist() == [[7, 15, 19], [27, 35, 39]]
    assert packed[:, 12].tolist() == [7, 7]
    assert packed[:, 13:].eq(0).all()


def test_encoder_sees_chunks_and_their_first_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "CHUNK_ELEMENTS", 16)
    seen = []

    def encode(groups: Tensor, first_row: int) -> Sequence[Tensor]:
        seen.append((first_row, groups.shape[0]))
        return (groups.flatten(1),)

    weight = torch.randn(5, 8)
    packed = quantize_in_groups(weight, 8, 32, encode)
    assert seen == [(0, 2), (2, 2), (4, 1)]
    assert torch.equal(read_packed_field(packed, 0, 8, torch.float32), weight)


def test_field_copies_from_any_alignment() -> None:
    buffer = torch.zeros(1 + 3 * 8, dtype=torch.uint8)
    packed = buffer[1:].view(3, 8)  # starts at an odd byte
    numbers = torch.tensor([[1.5], [2.5], [-3.0]])
    packed[:, 4:] = numbers.view(torch.uint8)
    assert torch.equal(read_packed_field(packed, 4, 1, torch.float32), numbers)
    assert read_packed_field(packed[:0], 4, 1, torch.float32).shape == (0, 1)
    assert torch.equal(read_packed_field(packed[1:2], 4, 1, torch.float32), numbers[1:2])


def test_divide_rounds_correctly() -> None:
    numbers = torch.rand(10_000)
    expected = (numbers.double() / 255).float()
    assert torch.equal(divide_exactly(numbers, 255), expected)
    assert not torch.equal(numbers * (1 / 255), expected), "else the function has no reason"


def test_not_finite_names_row_and_columns() -> None:
    statistics = torch.ones(4, 3)
    check_finite_statistics(statistics, 64, 0)
    statistics[2, 1] = torch.nan
    with pytest.raises(ValueError, match="row 102, columns 64 to 127"):
        check_finite_statistics(statistics, 64, 100)


def test_wrong_inputs_are_named() -> None:
    with pytest.raises(ValueError, match=r"floating-point matrix .* torch.int64 \[2, 2\]"):
        check_float_weight(torch.zeros(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"float32 \[4\]"):
        check_float_weight(torch.zeros(4))
    with pytest.raises(ValueError, match=r"int4 with in_features=64 are uint8 \[rows, 36\]"):
        check_packed_rows(torch.zeros(2, 35, dtype=torch.uint8), 36, "int4", 64)
    with pytest.raises(ValueError, match=r"not torch.int8 \[2, 36\]"):
        check_packed_rows(torch.zeros(2, 36, dtype=torch.int8), 36, "int4", 64)
