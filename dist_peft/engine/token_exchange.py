"""Experts that stay on their ranks: the tokens travel to them (expert parallelism).

A gather brings the packed experts of a block to all ranks, in each pass. Here each rank keeps whole
experts, computes the rows of all ranks that were routed to them, and sends the results back
(Shazeer et al. 2017; GShard, Lepikhin et al. 2020), over a base that is frozen and packed::

    rest        rank 0   | expert 0 | expert 1 |      ceil(E / ranks) experts each, of both stacks;
                rank 1   | expert 2 | expert 3 |      the last ranks may have fewer or none
                rank 2   | expert 4 |
    counts      all-gather of the rows by expert, long [ranks, E]: the only copy to the host
    there       all-to-all of rows [n, H], sorted by expert, and of dropout's keys of their tokens
    products    of each expert with its rows, ordered by the rank that they come from
    back        all-to-all of the results [n, H]; the router's weights are applied where they are

and for gradients the same two ways. A row that is sent weighs ``2 H`` bytes in 16 bits, so a rank
receives ``T k`` rows four times a micro-batch, six with activation checkpointing, where the gather
brings the block's experts two times. Where ranks have several experts, the rows of a token and a
rank are sent as one (``engine.joined_rows``); those of Llama 4, one expert a token, never are.
Of the factors of LoRA on experts a rank gathers those of its own experts under FSDP2
(``engine.expert_factors``). DeepSpeed keeps, reduces and gathers whole ones: a rank's gradients are
those of all ranks' rows for its own experts, and zeros for others, so that the sum over ranks is
the whole gradient.

The results are those of the gather but for rounding: a product of other rows together may add in
another order, the results of a token's experts are added up rank by rank, and a factor's gradient
is one sum over the rows of all ranks instead of a sum of sums.
On the same ranks they are the same bits each time.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dist_peft.core.span import Span, row_span
from dist_peft.engine.compat import all_gather
from dist_peft.engine.gather_unit import ShardedParameter
from dist_peft.engine.joined_rows import JoinedRows, PairTable, expect_rows, sum_rows, take_rows
from dist_peft.model.expert_exchange import ExpertProduct
from dist_peft.model.experts import ExpertStack, FrozenExperts
from dist_peft.model.sample_dropout import SampleDropout
from dist_peft.quant.assumed_device import get_assumed_device
from dist_peft.quant.grouped_matmul import RowGroups, count_sorted

__all__ = ["ExchangeOwner", "OwnedStack", "Routes", "TokenExchange", "Wire"]


class ExchangeOwner(Protocol):
    """The ranks that share the experts."""

    group: dist.ProcessGroup
    device: torch.device
    parts: int
    index: int
    bytes_gathered: int

    def allocate_resting(self, size: int) -> Tensor: ...


class OwnedStack(ShardedParameter):
    """A stack of which this rank keeps and computes whole experts."""

    def __init__(self, stack: ExpertStack, owner: ExchangeOwner) -> None:
        super().__init__(stack.packed, owner.parts, together=stack.out_features)
        self.stack, self.owner = stack, owner
        stack.own_experts = row_span(stack.experts, owner.parts, owner.index)

    def fill_local_rows(self, rows: Tensor, device: torch.device | None = None) -> nn.Parameter:
        if not self.local.numel():
            self.local = self.owner.allocate_resting(self.part)
        parameter = super().fill_local_rows(rows, device)
        own = self.local[: rows.numel()].view(rows.shape)
        # no parameter of the module: an engine that looks for some would take it
        vars(self.stack)["own_rows"] = nn.Parameter(own, requires_grad=False)
        return parameter


class TokenExchange:
    """Sends the rows of one layer's experts to their ranks; see ``model.expert_exchange``.

    Args:
        experts: whose stacks are ``OwnedStack``.
        owner: the ranks.

    Attributes:
        bytes_exchanged: received by this rank; also among the owner's ``bytes_gathered``.
    """

    def __init__(self, experts: FrozenExperts, owner: ExchangeOwner) -> None:
        self.owner, self.num_experts = owner, experts.num_experts
        spans = [row_span(self.num_experts, owner.parts, part) for part in range(owner.parts)]
        self.spans, self.bytes_exchanged = spans, 0
        self._dropouts = [m for m in experts.modules() if isinstance(m, SampleDropout)]

    def plan_routes(self, counts: Tensor, assumed_rows: int) -> "Routes":
        """Tell all ranks how many rows each expert gets; see ``RowGroups.read_counts``."""
        own = self.spans[self.owner.index]
        if get_assumed_device() is not None:
            groups = RowGroups.read_counts(counts, assumed_rows)
            received, experts, share = self._assume_received(assumed_rows, counts.device)
            return Routes(self, groups, received, Wire(self, [assumed_rows], [share]), experts)
        table = self._share_counts(counts)
        known: list[list[int]] = table.tolist()
        mine = known[self.owner.index]
        receive = [sum(column[own.slice]) for column in known]
        received, experts = self._group_received(table, known)
        send = [sum(mine[span.slice]) for span in self.spans]
        return Routes(
            self, RowGroups.from_counts(mine), received, Wire(self, send, receive), experts
        )

    def joins_rows(self, chosen: int) -> bool:
        """Whether tokens of ``chosen`` experts may have several of them on one rank."""
        return self.owner.parts > 1 and chosen > 1 and len(self.spans[0]) > 1

    def compute_joined(
        self,
        x: Tensor,
        chosen: Tensor,
        weights: Tensor,
        compute: ExpertProduct,
    ) -> Tensor:
        """Return the weighted sums ``[T, H]`` of the ``chosen`` [T, k] experts' results; a token's
        row travels once to each rank of these (``engine.joined_rows``)."""
        pairs = PairTable(chosen, self.num_experts, self.owner.parts)
        rows, count = self._plan_joined(pairs, *chosen.shape)
        tokens, keys = pairs.list_row_tokens(count), None
        if (dropout := self._find_dropout()) is not None:
            keys = dropout.find_row_keys(tokens, len(x))
        sums = rows.compute_at_owners(
            take_rows(x, tokens), pairs.pair_rows, weights.flatten()[pairs.order], keys, compute
        )
        return sum_rows(sums, tokens, len(x)).to(x.dtype)

    def _plan_joined(self, pairs: PairTable, tokens: int, chosen: int) -> tuple[JoinedRows, int]:
        """Tell all ranks how many pairs and rows they get; return also how many rows are sent."""
        index, parts, device = self.owner.index, self.owner.parts, pairs.tokens.device
        own, counts = self.spans[index], count_sorted(pairs.by_expert, self.num_experts)
        if get_assumed_device() is not None:
            received, experts, share = self._assume_received(tokens * chosen, device)
            shares = [
                expect_rows(tokens, chosen, self.num_experts, len(span)) for span in self.spans
            ]
            wire = Wire(self, [sum(shares)], [shares[index] * parts])
            pair_wire = Wire(self, [tokens * chosen], [share])
            first = torch.zeros(share, dtype=torch.long, device=device)
            moves = (wire.move_rows, pair_wire.move_rows)
            return JoinedRows(*moves, received, experts, first, wire.receive[0]), wire.send[0]
        table = self._share_counts(torch.cat([counts, pairs.rows_by_rank]))
        known: list[list[int]] = table.tolist()
        received, experts = self._group_received(table, known)
        mine, arriving = known[index], [sum(column[own.slice]) for column in known]
        pair_wire = Wire(self, [sum(mine[span.slice]) for span in self.spans], arriving)
        place = self.num_experts + index
        wire = Wire(self, mine[self.num_experts :], [column[place] for column in known])
        first = table[:, place].cumsum(0) - table[:, place]
        first = first.repeat_interleave(table[:, own.slice].sum(1), output_size=sum(arriving))
        moves = (wire.move_rows, pair_wire.move_rows)
        return JoinedRows(*moves, received, experts, first, sum(wire.receive)), sum(wire.send)

    def _share_counts(self, counts: Tensor) -> Tensor:
        """Return the ``counts`` [n] of all ranks, ``[ranks, n]``."""
        table = counts
        if self.owner.parts > 1:
            table = counts.new_empty(self.owner.parts * len(counts))
            all_gather(table, counts, group=self.owner.group)
        return table.view(self.owner.parts, -1)

    def _group_received(
        self, table: Tensor, known: Sequence[Sequence[int]]
    ) -> tuple[RowGroups, Tensor]:
        """Return the groups of rows that this rank computes, and their experts as they arrive.

        Args:
            table: rows by rank and expert, and further columns; ``known``: the same on the host.
        """
        own, counts = self.spans[self.owner.index], [0] * self.num_experts
        counts[own.slice] = [sum(column[e] for column in known) for e in range(*_ends(own))]
        ids = torch.arange(*_ends(own), device=table.device).repeat(len(known))
        arrived = table[:, own.slice].flatten()
        experts = ids.repeat_interleave(arrived, output_size=sum(counts))
        return RowGroups.from_counts(counts), experts

    def _assume_received(self, rows: int, device: torch.device) -> tuple[RowGroups, Tensor, int]:
        """The same for a plan, of an even router, with the number of rows."""
        own = self.spans[self.owner.index]
        share = -(-rows * self.owner.parts * len(own) // self.num_experts)
        groups = RowGroups.assume_shares(share, own, self.num_experts)
        return groups, torch.zeros(share, dtype=torch.long, device=device), share

    def _find_dropout(self) -> SampleDropout | None:
        """Return one that drops, of which all have the same keys; None: nothing is dropped."""
        return next((d for d in self._dropouts if d.p and d.training), None)

    def make_dropout_keys(self, groups: RowGroups) -> Tensor | None:
        """Return the keys of the rows' tokens ``[n, 2]``; None where nothing is dropped."""
        active = self._find_dropout()
        if active is None:
            return None
        assert groups.tokens is not None
        return active.find_row_keys(groups.tokens, groups.num_tokens)


class Routes:
    """Where the rows of one call go, and come from.

    Args:
        exchange: of the layer.
        groups: of the rows that this rank's tokens have.
        received: of the rows that this rank computes.
        wire: their numbers by rank.
        experts: of the rows as they arrive, by rank and then by expert.
    """

    def __init__(
        self,
        exchange: TokenExchange,
        groups: RowGroups,
        received: RowGroups,
        wire: "Wire",
        experts: Tensor,
    ) -> None:
        self.exchange, self.groups, self.received, self.wire = exchange, groups, received, wire
        self.sorted_experts, self.order = experts.sort(stable=True)

    def compute_at_owners(
        self,
        x: Tensor,
        groups: RowGroups,
        compute: ExpertProduct,
    ) -> Tensor:
        """Return the results ``[n, H]`` of ``x`` [n, H]; see ``RowRoutes``."""
        keys = self.exchange.make_dropout_keys(groups)
        if keys is not None:
            keys = self.wire.move_sorted(keys, self.order, outward=True)
        rows: Tensor = _Travel.apply(x, self.order, self.wire, True)
        y = compute(rows, self.received.with_keys(keys), self.sorted_experts)
        back: Tensor = _Travel.apply(y, self.order, self.wire, False)
        return back


class Wire:
    """The all-to-all of one call; numbers only, so that nothing of it takes memory until backward.

    Args:
        exchange: of the layer.
        send, receive: rows for each rank, and from each.
    """

    def __init__(self, exchange: TokenExchange, send: list[int], receive: list[int]) -> None:
        self.exchange, self.send, self.receive = exchange, send, receive

    def move_rows(self, rows: Tensor, outward: bool) -> Tensor:
        """Send ``rows`` ``[n, m]`` to the ranks of their experts, or results back."""
        ways = (self.send, self.receive)
        return self._exchange(rows, *(ways if outward else ways[::-1]))

    def move_sorted(self, rows: Tensor, order: Tensor, outward: bool) -> Tensor:
        """The same of rows that are sorted by expert at both ends.

        Args:
            order: of arrived rows by expert, long ``[sum(receive)]``.
        """
        if outward:
            return self.move_rows(rows, outward)[order]
        return self.move_rows(torch.empty_like(rows).index_copy_(0, order, rows), outward)

    def _exchange(self, rows: Tensor, send: list[int], receive: list[int]) -> Tensor:
        """All-to-all of ``rows``, as bytes: ``[sum(send), m]`` -> ``[sum(receive), m]``."""
        owner = self.exchange.owner
        if owner.parts == 1:
            return rows
        arrived = rows.new_empty(sum(receive), rows.shape[1])
        owner.bytes_gathered += arrived.nbytes
        self.exchange.bytes_exchanged += arrived.nbytes
        if get_assumed_device() is not None:
            return arrived  # a plan traces steps on tensors without values
        output, data = (t.view(torch.uint8) for t in (arrived, rows.contiguous()))
        dist.all_to_all_single(output, data, receive, send, group=owner.group)
        return arrived


class _Travel(torch.autograd.Function):
    """Rows that go one way, whose gradients go the other."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, wire: Wire, outward: bool) -> Tensor:
        ctx.save_for_backward(order)
        ctx.wire, ctx.outward = wire, outward
        return wire.move_sorted(rows, order, outward)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (order,) = ctx.saved_tensors
        return ctx.wire.move_sorted(grads[0], order, not ctx.outward), None, None, None


def _ends(span: Span) -> tuple[int, int]:
    return span.start, span.stop
