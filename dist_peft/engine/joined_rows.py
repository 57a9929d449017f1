"""A token's row is sent once to each rank that has some of its experts.

Sent for each expert (``engine.token_exchange``), a row travels ``k`` times. Of ``E`` experts on
``N`` ranks, evenly routed, it needs ``N (1 - (1 - 1/N)^k)`` ranks: with 8 of 256 experts, two ranks
instead of eight times, or 5.3 of eight ranks. Here the rows of a token and a rank are one, and the
rank adds up the results of its experts (as DeepSeek-V3 sends a token once to each node)::

    pairs       a token and an expert, sorted by expert: the number of the row among those that its
                rank gets, int32, and the router's weight, float32; one all-to-all
    there       all-to-all of rows [m, H]
    products    of each pair, weighted; pairs of a row are added up in float32 in their order
    back        all-to-all of the sums [m, H], which are added up over ranks in float32

and for gradients the same ways back. A sum is rounded to the type of the rows before it travels;
with float32 the losses stay within rounding. Sums are in one order, so that on the same ranks the
bits are the same each time.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dist_peft.model.expert_exchange import ExpertProduct
from dist_peft.quant.grouped_matmul import RowGroups

__all__ = ["JoinedRows", "PairTable", "expect_rows", "sum_rows", "take_rows"]

Move = Callable[[Tensor, bool], Tensor]
"""Sends rows to the ranks of their experts (True), or results back."""


class PairTable:
    """The pairs of this rank's tokens, on the device.

    Args:
        chosen: long ``[T, k]``, the experts of each token.
        experts: their number.
        parts: ranks, of which each has ``ceil(experts / parts)`` or fewer.

    Attributes:
        by_expert, order: the pairs' experts, ascending, and their places in ``chosen``.
        tokens: of the pairs.
        rows_by_rank: long ``[parts]``.
    """

    def __init__(self, chosen: Tensor, experts: int, parts: int) -> None:
        self.num_tokens, k = chosen.shape
        self.by_expert, self.order = chosen.flatten().sort(stable=True)
        self.tokens = self.order // k
        ranks = self.by_expert // -(-experts // parts)
        places = ranks * self.num_tokens + self.tokens
        is_sent = torch.zeros(parts * self.num_tokens, dtype=torch.long, device=chosen.device)
        is_sent = is_sent.index_fill(0, places, 1)
        self.rows_by_rank = is_sent.view(parts, -1).sum(1)
        first = self.rows_by_rank.cumsum(0) - self.rows_by_rank
        self.pair_rows = ((is_sent.cumsum(0) - 1)[places] - first[ranks]).int()
        self._is_sent = is_sent

    def list_row_tokens(self, count: int) -> Tensor:
        """Return the tokens of the ``count`` rows to be sent, by rank and then by token."""
        # the indices of the ones, whose number is known
        places = self._is_sent.argsort(descending=True, stable=True)[:count]
        return places % max(1, self.num_tokens)


class JoinedRows:
    """Where the rows of one call go, and come from.

    Args:
        move_rows: of ``[m, H]``; move_pairs: of ``[n, c]``, sorted by expert.
        received: groups of the pairs that this rank computes.
        experts: of the pairs as they arrive, by rank and then by expert.
        first_rows: of the rows that have arrived, the first of each pair's rank, long.
        num_arriving: rows that arrive.
    """

    def __init__(
        self,
        move_rows: Move,
        move_pairs: Move,
        received: RowGroups,
        experts: Tensor,
        first_rows: Tensor,
        num_arriving: int,
    ) -> None:
        self.move_rows, self.move_pairs = move_rows, move_pairs
        self.received, self.first_rows, self.num_arriving = received, first_rows, num_arriving
        self.sorted_experts, self.order = experts.sort(stable=True)

    def compute_at_owners(
        self,
        x: Tensor,
        pair_rows: Tensor,
        weights: Tensor,
        keys: Tensor | None,
        compute: ExpertProduct,
    ) -> Tensor:
        """Return for each row the weighted sum of the results of its rank's experts.

        Args:
            x: ``[m, H]``, sorted by rank.
            pair_rows: int32 ``[n]``, of each pair, among the rows that its rank gets.
            weights: ``[n]``.
            keys: of the rows' tokens, by which dropout drops; see ``RowGroups``.
            compute: see ``model.expert_exchange``.

        Returns:
            ``[m, H]`` in the type of ``x``.
        """
        factors, places = _TravelPairs.apply(weights, pair_rows, self.move_pairs)
        takes = (places.long() + self.first_rows)[self.order]
        if keys is not None:
            keys = self.move_rows(keys, True)[takes]
        rows: Tensor = _Travel.apply(x, self.move_rows, True)
        y = compute(take_rows(rows, takes), self.received.with_keys(keys), self.sorted_experts)
        sums = sum_rows(y * factors[self.order].unsqueeze(1), takes, self.num_arriving)
        back: Tensor = _Travel.apply(sums.to(x.dtype), self.move_rows, False)
        return back


def expect_rows(tokens: int, chosen: int, experts: int, own: int) -> int:
    """Return how many of ``tokens`` choose one of a rank's ``own`` experts or more, if each chooses
    ``chosen`` different ones of ``experts`` evenly: the expected number, rounded up."""
    missed = 1.0
    for number in range(chosen):
        missed *= max(0, experts - own - number) / (experts - number)
    return -int(-tokens * (1 - missed) // 1)


def take_rows(rows: Tensor, index: Tensor) -> Tensor:
    """Return ``rows[index]``, whose gradients are added up by ``sum_rows``."""
    taken: Tensor = _TakeRows.apply(rows, index)
    return taken


def sum_rows(values: Tensor, index: Tensor, count: int) -> Tensor:
    """Add up rows of the same ``index``, in their order.

    Args:
        values: ``[p, H]``, any float type.
        index: long ``[p]``, below ``count``.

    Returns:
        float32 ``[count, H]``.
    """
    total: Tensor = _SumRows.apply(values, index, count)
    return total


def _add_rows(values: Tensor, index: Tensor, count: int) -> Tensor:
    total = torch.zeros(count, values.shape[1], device=values.device)
    if total.is_cuda:  # which sorts the rows, where index_add adds in any order
        return total.index_put_((index,), values.float(), accumulate=True)
    return total.index_add_(0, index, values.float())


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.count = len(rows)
        return rows[index]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return _add_rows(grads[0], index, ctx.count).to(grads[0].dtype), None


class _SumRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, index: Tensor, count: int) -> Tensor:
        ctx.save_for_backward(index)
        ctx.dtype = values.dtype
        return _add_rows(values, index, count)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (index,) = ctx.saved_tensors
        return grads[0].to(ctx.dtype)[index], None, None


class _Travel(torch.autograd.Function):
    """Rows that go one way, whose gradients go the other."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, move: Move, outward: bool) -> Tensor:
        ctx.move, ctx.outward = move, outward
        return move(rows, outward)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.move(grads[0], not ctx.outward), None, None


class _TravelPairs(torch.autograd.Function):
    """Weights ``[n]`` and places, int32 ``[n]``, of which the weights have gradients."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, places: Tensor, move: Move) -> tuple[Tensor, Tensor]:
        ctx.move, ctx.dtype = move, weights.dtype
        pairs = torch.stack([weights.float().view(torch.int32), places], 1)
        arrived = move(pairs, True)
        found = arrived[:, 0].contiguous().view(torch.float32), arrived[:, 1].contiguous()
        ctx.mark_non_differentiable(found[1])
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.move(grads[0].unsqueeze(1), False).squeeze(1).to(ctx.dtype), None, None
