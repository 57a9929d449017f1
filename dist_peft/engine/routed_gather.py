"""Gathers of those experts of a mixture that tokens of any rank were routed to.

A block's unit brings all experts. Here the two stacks of a layer (``model.experts``) are a unit of
their own, gathered after the router has chosen::

    router          each rank's chosen experts, uint8 [E], maximum over the ranks: one small
                    all-reduce, so that all ranks know the same set
    gather          of this set, each rank broadcasts the rows that it keeps:
                    rank 0   | gate_up rows | down rows |     in one buffer, not padded; a rank
                    rank 1   | gate_up rows | down rows |     without any sends nothing
    stacks          whole in shape; rows of other experts have no values, and are not read, as only
                    experts with tokens are dequantized (``quant.grouped_matmul``)

With ``T`` tokens of all ranks, ``k`` of ``E`` experts each, routed evenly, a share ``1 - (1 -
k/E)^T`` of the experts is gathered: less than half only while ``T k < 0.7 E``, and practically all
in a batch of whole sequences. Nothing can be gathered ahead of the router, whereas a block's unit
travels while the block before computes. So it is an option, for few or short sequences
(``engine.gather_experts``); ``dist-peft plan`` counts both.

Backward gathers the set of its own forward again, known without an exchange, and the set of the
layer before while it computes. With activation checkpointing a block's forward is computed again
first: hooks of the *block* are outside of that, which tells the first pass from the second.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_peft.core.span import Span, row_span
from dist_peft.engine.gather_unit import ShardedParameter
from dist_peft.model.experts import FrozenExperts
from dist_peft.quant.assumed_device import get_assumed_device

__all__ = ["RoutedOwner", "RoutedUnit", "expect_routed", "register_routed_hooks"]


class RoutedOwner(Protocol):
    """The ranks that share the rows."""

    group: dist.ProcessGroup
    device: torch.device
    parts: int
    index: int
    bytes_gathered: int

    def allocate_resting(self, size: int) -> Tensor: ...


class RoutedUnit:
    """The stacks of one layer's experts, of which some experts are gathered.

    Args:
        slots: of the stacks, ``[E * out, row_bytes]``.
        experts: their number.
        owner: the ranks.

    Attributes:
        whole: rows of ``gathered`` are there.
        gathered: the experts that are there or under way, ascending; None: none.
        is_first_pass: the block's own forward is running, not its recomputation.
        last_set: of the last forward that has a backward.
    """

    def __init__(self, slots: Sequence[ShardedParameter], experts: int, owner: RoutedOwner) -> None:
        self.slots, self.experts, self.owner = list(slots), experts, owner
        for slot in self.slots:
            slot.local = owner.allocate_resting(slot.part)
        self.whole = False
        self.gathered: tuple[int, ...] | None = None
        self.last_set: tuple[int, ...] | None = None
        self.is_first_pass = False
        self.is_agreed = False
        """Whether ``gathered`` is the set of the pass that computes, not a guess ahead of it."""
        self.pending: list[tuple[int, Tensor, dist.Work | None]] | None = None

    @property
    def resting_tensors(self) -> list[Tensor]:
        """This rank's rows."""
        return [slot.local for slot in self.slots]

    def start_gather(self, experts: tuple[int, ...]) -> None:
        """Begin to gather ``experts``, ascending and the same on all ranks, in place of others."""
        if self.gathered == experts:
            return
        self.free_full_tensors()
        self.gathered, self.pending = experts, []
        for slot in self.slots:
            slot.allocate_full_tensor()
        for source in range(self.owner.parts):
            pieces = list(self._list_pieces(experts, source))
            size = sum(stop - first for _, first, stop, _ in pieces)
            if size:
                self.pending.append((source, *self._broadcast(pieces, size, source)))

    def _broadcast(
        self, pieces: Sequence[tuple[ShardedParameter, int, int, int]], size: int, source: int
    ) -> tuple[Tensor, dist.Work | None]:
        owner = self.owner
        owner.bytes_gathered += size
        if source == owner.index:
            parts = [slot.local[first:stop] for slot, first, stop, _ in pieces]
            buffer = torch.cat(parts).to(owner.device, non_blocking=True)
        else:
            buffer = torch.empty(size, dtype=torch.uint8, device=owner.device)
        if owner.parts == 1 or get_assumed_device() is not None:
            return buffer, None  # a plan traces steps on tensors without values
        work = dist.broadcast(buffer, group=owner.group, async_op=True, group_src=source)
        return buffer, work

    def _list_pieces(
        self, experts: Sequence[int], source: int
    ) -> Iterator[tuple[ShardedParameter, int, int, int]]:
        """Yield what ``source`` keeps of ``experts``: slot, begin and end in its resting bytes, and
        the begin in the whole parameter."""
        runs = list(_iterate_runs(experts))
        for slot in self.slots:
            count = slot.shape[0]
            own, per_expert = row_span(count, self.owner.parts, source), count // self.experts
            for run in runs:
                rows = Span(run.start * per_expert, run.stop * per_expert).intersect(own)
                if len(rows):
                    first = (rows.start - own.start) * slot.row_bytes
                    stop = (rows.stop - own.start) * slot.row_bytes
                    yield slot, first, stop, rows.start * slot.row_bytes

    def wait_gathered(self) -> None:
        """Wait for the rows and put them into the stacks."""
        if self.pending is None:
            return
        pending, self.pending = self.pending, None
        assert self.gathered is not None
        for source, buffer, work in pending:
            if work is not None:
                work.wait()
            taken = 0
            for slot, first, stop, place in self._list_pieces(self.gathered, source):
                size = stop - first
                slot.bytes[place : place + size].copy_(buffer[taken : taken + size])
                taken += size
        self.whole = True

    def release_full_tensors(self) -> None:
        """Free the stacks after use."""
        self.free_full_tensors()

    def free_full_tensors(self) -> None:
        """Free the stacks, after what is under way has arrived."""
        for _, _, work in self.pending or ():
            if work is not None:
                work.wait()
        if self.gathered is not None:
            for slot in self.slots:
                slot.free_full_tensor()
        self.pending, self.gathered = None, None
        self.whole = self.is_agreed = False


def _iterate_runs(experts: Sequence[int]) -> Iterator[Span]:
    """Yield neighbors of ``experts``, ascending, as spans."""
    first = 0
    for place in range(1, len(experts) + 1):
        if place == len(experts) or experts[place] != experts[place - 1] + 1:
            yield Span(experts[first], experts[place - 1] + 1)
            first = place


def expect_routed(experts: int, chosen: int, tokens: int) -> int:
    """Return how many of ``experts`` get one of ``tokens`` tokens, each routed to ``chosen``
    different ones evenly: the expected number, rounded up."""
    if not tokens:
        return 0
    unused = (1 - min(1.0, chosen / experts)) ** tokens
    return min(experts, max(1, -int(-experts * (1 - unused) // 1)))


def register_routed_hooks(
    block: nn.Module, experts: FrozenExperts, unit: RoutedUnit, previous: RoutedUnit | None
) -> None:
    """Gather ``unit`` when ``experts`` are called, and before their backward.

    Args:
        block: has ``experts``; its calls are first passes.
        previous: the layer before, which is gathered while backward computes this one.
    """
    hooks = _RoutedHooks(experts, unit, previous)
    block.register_forward_pre_hook(hooks.begin_block)
    block.register_forward_hook(hooks.end_block, always_call=True)
    experts.register_forward_pre_hook(hooks.before_forward)
    experts.register_forward_hook(hooks.after_forward)


class _RoutedHooks:
    def __init__(
        self, experts: FrozenExperts, unit: RoutedUnit, previous: RoutedUnit | None
    ) -> None:
        self.experts, self.unit, self.previous = experts, unit, previous

    def begin_block(self, module: nn.Module, inputs: Any) -> None:
        self.unit.is_first_pass = True
        self.unit.free_full_tensors()  # of a backward that did not come to its end

    def end_block(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.unit.is_first_pass = False

    def before_forward(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        unit = self.unit
        if not unit.is_agreed:  # in a recomputation the set of its backward may be there
            unit.start_gather(self._agree_on_set(inputs))
            unit.is_agreed = True
        unit.wait_gathered()

    def _agree_on_set(self, inputs: tuple[Tensor, ...]) -> tuple[int, ...]:
        owner, experts = self.unit.owner, self.unit.experts
        if get_assumed_device() is not None:
            tokens, chosen = self.experts.count_choices(*inputs)
            # the four experts or fewer that a trace gives tokens to are there
            return tuple(range(expect_routed(experts, chosen, tokens * owner.parts)))
        counts = self.experts.count_rows(*inputs)
        routed = (counts > 0).to(torch.uint8)
        if owner.parts > 1:
            dist.all_reduce(routed, dist.ReduceOp.MAX, group=owner.group)
        marks, own = torch.stack([routed.long(), counts]).tolist()  # one copy to the host
        self.experts.known_counts = own
        return tuple(expert for expert, mark in enumerate(marks) if mark)

    def after_forward(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        unit, gathered = self.unit, self.unit.gathered
        assert gathered is not None
        if not unit.is_first_pass:
            return  # backward of this layer follows
        unit.free_full_tensors()
        if not output.requires_grad:
            return
        unit.last_set = gathered

        def before_backward(grad: Tensor) -> None:
            unit.start_gather(gathered)
            unit.is_agreed, unit.last_set = True, None
            unit.wait_gathered()
            if self.previous is not None and self.previous.last_set is not None:
                self.previous.start_gather(self.previous.last_set)

        def after_backward(grad: Tensor) -> None:
            unit.free_full_tensors()

        output.register_hook(before_backward)
        if inputs[0].requires_grad:
            inputs[0].register_hook(after_backward)
