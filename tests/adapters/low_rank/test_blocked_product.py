"""Float32 products of a merge, in blocks of rows."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dist_peft.adapters.low_rank.blocked_product import (
    BLOCK_ROWS,
    add_blocked_product,
    add_expert_products,
)
from dist_peft.core.span import Span

OUT = 3 * BLOCK_ROWS - 11


@given(st.integers(0, OUT), st.integers(0, OUT))
def test_rows_do_not_depend_on_the_chunk(a: int, b: int) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(OUT, 65, generator=generator)
    B, A = torch.randn(OUT, 5, generator=generator), torch.randn(5, 65, generator=generator)
    whole = add_blocked_product(rows, B, A, Span(0, OUT))
    exact = (rows.double() + B.double() @ A.double()).float()
    torch.testing.assert_close(whole, exact, rtol=1e-5, atol=2e-6)
    span = Span(min(a, b), max(a, b))
    assert torch.equal(add_blocked_product(rows[span.slice], B, A, span), whole[span.slice])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_of_16_bits_are_added_in_float32(dtype: torch.dtype) -> None:
    rows, B, A = torch.randn(9, 4).to(dtype), torch.randn(9, 2), torch.randn(2, 4)
    before = rows.clone()
    found = add_blocked_product(rows, B, A, Span(0, 9))
    assert found.dtype == torch.float32
    assert torch.equal(found, add_blocked_product(rows.float(), B, A, Span(0, 9)))
    assert torch.equal(rows, before)


def test_each_expert_has_its_own_product_at_any_cut() -> None:
    generator = torch.Generator().manual_seed(0)
    experts, out, r = 3, 70, 2
    rows = torch.randn(experts * out, 8, generator=generator)
    B = torch.randn(experts * out, r, generator=generator)
    A = torch.randn(experts * r, 8, generator=generator)
    whole = add_expert_products(rows, B, A, 0.5, experts, Span(0, experts * out))
    wide = (t.view(experts, -1, t.shape[1]).double() for t in (rows, B, A))
    dense, left, right = wide
    exact = (dense + 0.5 * left @ right).view(-1, 8).float()
    torch.testing.assert_close(whole, exact, rtol=1e-5, atol=1e-5)
    for span in (Span(0, 0), Span(69, 71), Span(100, 210)):
        part = add_expert_products(rows[span.slice], B, A, 0.5, experts, span)
        assert torch.equal(part, whole[span.slice])
