import dataclasses
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dist_peft.core.span import Span, row_span


@st.composite
def spans(draw: st.DrawFn, most: int = 30) -> Span:
    start = draw(st.integers(0, most))
    return Span(start, draw(st.integers(start, most)))


def _rows(span: Span) -> set[int]:
    return set(range(span.start, span.stop))


# -- row_span --------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", range(1, 10))
def test_row_span_is_torch_chunk_and_covers_every_row_once(parts: int) -> None:
    for num_rows in range(41):
        spans = [row_span(num_rows, parts, index) for index in range(parts)]
        chunks = list(torch.arange(num_rows).chunk(parts)) if num_rows else []
        chunks += [torch.arange(0)] * (parts - len(chunks))  # FSDP2 gives the last ranks nothing
        for span, chunk in zip(spans, chunks, strict=True):
            assert list(range(span.start, span.stop)) == chunk.tolist()
        assert spans[0].start == 0
        assert spans[-1].stop == num_rows
        for before, after in itertools.pairwise(spans):
            assert before.stop == after.start


def test_row_span_examples_of_the_docstring() -> None:
    assert [row_span(10, 4, i) for i in range(4)] == [
        Span(0, 3),
        Span(3, 6),
        Span(6, 9),
        Span(9, 10),
    ]
    assert [row_span(5, 4, i) for i in range(4)] == [
        Span(0, 2),
        Span(2, 4),
        Span(4, 5),
        Span(5, 5),
    ]


@given(st.integers(0, 10**12), st.integers(1, 10_000), st.data())
def test_row_span_of_large_tensors(num_rows: int, parts: int, data: st.DataObject) -> None:
    index = data.draw(st.integers(0, parts - 1))
    span = row_span(num_rows, parts, index)
    assert 0 <= span.start <= span.stop <= num_rows
    assert len(span) <= len(row_span(num_rows, parts, 0))
    if index:
        assert row_span(num_rows, parts, index - 1).stop == span.start
    else:
        assert span.start == 0
    if index == parts - 1:
        assert span.stop == num_rows


@pytest.mark.parametrize(("parts", "index"), [(4, 4), (4, -1), (0, 0), (-1, 0)])
def test_row_span_of_a_part_that_does_not_exist(parts: int, index: int) -> None:
    with pytest.raises(ValueError, match=f"part {index} of {parts} does not exist"):
        row_span(10, parts, index)


# -- Span ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2), (-2, -1)])
def test_what_is_no_span(start: int, stop: int) -> None:
    with pytest.raises(ValueError, match=rf"not a span: \[{start}, {stop}\)"):
        Span(start, stop)


def test_a_span_is_a_value() -> None:
    span = Span(2, 5)
    assert span == Span(2, 5)
    assert hash(span) == hash(Span(2, 5))
    assert len(span) == 3
    assert span.slice == slice(2, 5)
    assert "abcdefg"[span.slice] == "cde"
    with pytest.raises(dataclasses.FrozenInstanceError):
        span.start = 0  # type: ignore[misc]


@given(spans(), spans())
def test_intersect_is_the_intersection_and_stays_inside(first: Span, second: Span) -> None:
    both = first.intersect(second)
    assert _rows(both) == _rows(first) & _rows(second)
    assert first.start <= both.start <= both.stop <= first.stop


@given(spans(), st.integers(-30, 30))
def test_shift_moves_every_row(span: Span, offset: int) -> None:
    if span.start + offset < 0:
        with pytest.raises(ValueError, match="not a span"):
            span.shifted_by(offset)
    else:
        assert span.shifted_by(offset) == Span(span.start + offset, span.stop + offset)
        assert span.shifted_by(offset).shifted_by(-offset) == span


@given(spans(), st.integers(1, 12))
def test_chunks_cover_the_span_in_order(span: Span, rows: int) -> None:
    chunks = list(span.split_into_chunks(rows))
    assert [row for chunk in chunks for row in range(chunk.start, chunk.stop)] == list(
        range(span.start, span.stop)
    )
    assert all(len(chunk) == rows for chunk in chunks[:-1])
    assert all(0 < len(chunk) <= rows for chunk in chunks)


@pytest.mark.parametrize("rows", [0, -1])
def test_chunks_of_no_rows(rows: int) -> None:
    with pytest.raises(ValueError, match=f"a chunk has at least one row, not {rows}"):
        list(Span(0, 3).split_into_chunks(rows))
