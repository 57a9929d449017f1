"""Pairs of tokens and experts, and sums of their rows; ranks are in ``test_token_exchange``."""

from itertools import chain

import pytest
import torch

from dist_peft.engine.joined_rows import PairTable, expect_rows, sum_rows, take_rows


@pytest.mark.parametrize(("tokens", "chosen", "experts", "parts"), [(7, 3, 5, 2), (0, 2, 4, 3)])
def test_rows_of_pairs(tokens: int, chosen: int, experts: int, parts: int) -> None:
    """Each pair finds its token among the rows that its rank gets, each of which is needed."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(tokens, experts, generator=generator)
    index = scores.topk(chosen, 1).indices
    pairs = PairTable(index, experts, parts)
    ranks = pairs.by_expert // -(-experts // parts)
    wanted = [
        sorted({int(t) for t, r in zip(pairs.tokens, ranks, strict=True) if r == part})
        for part in range(parts)
    ]
    assert pairs.rows_by_rank.tolist() == [len(own) for own in wanted]
    assert pairs.list_row_tokens(sum(map(len, wanted))).tolist() == list(chain(*wanted))
    found = [wanted[rank][row] for rank, row in zip(ranks, pairs.pair_rows, strict=True)]
    assert found == pairs.tokens.tolist()
    assert torch.equal(index.flatten()[pairs.order], pairs.by_expert)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_and_copies_of_rows(dtype: torch.dtype) -> None:
    """Against a loop; each has the other for its gradient. Sums of 16 bits are rounded once."""
    generator = torch.Generator().manual_seed(0)
    index = torch.tensor([2, 0, 2, 2, 4])
    values = torch.randn(5, 3, generator=generator).to(dtype).requires_grad_()
    total = sum_rows(values, index, 6)
    wanted = torch.zeros(6, 3)
    for value, place in zip(values.detach().float(), index, strict=True):
        wanted[place] += value
    assert total.dtype == torch.float32 and torch.equal(total, wanted)
    grad = torch.randn(6, 3, generator=generator)
    total.backward(grad)
    assert values.grad is not None and torch.equal(values.grad, grad.to(dtype)[index])
    rows = torch.randn(6, 3, generator=generator).to(dtype).requires_grad_()
    taken = take_rows(rows, index)
    assert torch.equal(taken, rows[index])
    taken.backward(values.detach())
    assert rows.grad is not None and torch.equal(rows.grad, wanted.to(dtype))


def test_rows_of_an_even_router() -> None:
    """Against the mean over drawn routings, to a row; the bounds exactly."""
    generator = torch.Generator().manual_seed(0)
    for tokens, chosen, experts, own in ((40, 8, 64, 8), (40, 2, 8, 1), (30, 4, 32, 16)):
        scores = torch.rand(200, tokens, experts, generator=generator)
        drawn = (scores.topk(chosen, -1).indices < own).any(-1).sum(1).float().mean()
        assert abs(expect_rows(tokens, chosen, experts, own) - 0.5 - float(drawn)) < 1
    assert expect_rows(5, 2, 4, 0) == 0 and expect_rows(5, 2, 4, 3) == expect_rows(5, 4, 4, 1) == 5
