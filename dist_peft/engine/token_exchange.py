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
brings the block's experts two times. Factors of LoRA on experts are gathered with the block as
ever: a rank's gradients are those of all ranks' rows for its own experts, and zeros for others, so
that the sum over ranks is the whole gradient.

The results are those of the gather but for rounding: a product of other rows together may add in
another order, and a factor's gradient is one sum over the rows of all ranks instead of a sum of
sums. On the same ranks they are the same bits each time.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dist_peft.core.span import Span, row_span
from dist_peft.engine.compat import all_gather
from dist_peft.engine.gather_unit import ShardedParameter
from dist_peft.model.experts import ExpertStack, FrozenExperts
from dist_peft.model.sample_dropout import SampleDropout
from dist_peft.quant.assumed_device import get_assumed_device
from dist_peft.quant.grouped_matmul import RowGroups

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
    """Sends the rows of one layer's experts to their ranks; see ``model.experts``.

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
        owner, own = self.owner, self.spans[self.owner.index]
        if get_assumed_device() is not None:
            groups = RowGroups.read_counts(counts, assumed_rows)
            share = -(-assumed_rows * owner.parts * len(own) // self.num_experts)
            received = RowGroups.assume_shares(share, own, self.num_experts)
            sources = torch.zeros(share, dtype=torch.long, device=counts.device)
            return Routes(self, groups, received, Wire(self, [assumed_rows], [share]), sources)
        table = counts
        if owner.parts > 1:
            table = counts.new_empty(owner.parts * self.num_experts)
            all_gather(table, counts, group=owner.group)
        table = table.view(owner.parts, self.num_experts)
        known: list[list[int]] = table.tolist()
        mine = known[owner.index]
        arriving = [0] * self.num_experts
        arriving[own.slice] = [sum(column[e] for column in known) for e in range(*_ends(own))]
        receive = [sum(column[own.slice]) for column in known]
        ids = torch.arange(*_ends(own), device=counts.device).repeat(owner.parts)
        arrived = table[:, own.slice].flatten()
        return Routes(
            self,
            RowGroups.from_counts(mine),
            RowGroups.from_counts(arriving),
            Wire(self, [sum(mine[span.slice]) for span in self.spans], receive),
            ids.repeat_interleave(arrived, output_size=sum(receive)),
        )

    def make_dropout_keys(self, groups: RowGroups) -> Tensor | None:
        """Return the keys of the rows' tokens ``[n, 2]``; None where nothing is dropped."""
        active = next((d for d in self._dropouts if d.p and d.training), None)
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
        compute: Callable[[Tensor, RowGroups, Tensor], Tensor],
    ) -> Tensor:
        """Return the results ``[n, H]`` of ``x`` [n, H]; see ``RowRoutes``."""
        keys = self.exchange.make_dropout_keys(groups)
        if keys is not None:
            keys = self.wire.move_rows(keys, self.order, outward=True)
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

    def move_rows(self, rows: Tensor, order: Tensor, outward: bool) -> Tensor:
        """Send ``rows`` ``[n, m]`` to their experts, or results back to their tokens.

        Args:
            order: of arrived rows by expert, long ``[sum(receive)]``.
        """
        if outward:
            return self._exchange(rows, self.send, self.receive)[order]
        by_source = torch.empty_like(rows).index_copy_(0, order, rows)
        return self._exchange(by_source, self.receive, self.send)

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
        return wire.move_rows(rows, order, outward)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (order,) = ctx.saved_tensors
        return ctx.wire.move_rows(grads[0], order, not ctx.outward), None, None, None


def _ends(span: Span) -> tuple[int, int]:
    return span.start, span.stop
