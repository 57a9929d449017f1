"""Pieces of routed experts over ranks, and how many experts an even router uses."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_peft.core.span import Span, row_span
from dist_peft.engine import routed_gather
from dist_peft.engine.gather_unit import ShardedParameter
from dist_peft.engine.routed_gather import RoutedUnit, expect_routed
from dist_peft.model.experts import ExpertStack, FrozenExperts
from dist_peft.quant.codec import RawCodec

EXPERTS, CPU = 5, torch.device("cpu")
SHAPES = ((EXPERTS * 6, 12), (EXPERTS * 4, 8))


@dataclass
class Rank:
    """One of three ranks, whose rows lie across experts; ``sent`` is what the others broadcast."""

    index: int
    sent: dict[int, Tensor] = field(default_factory=dict)
    group: Any = None
    device: torch.device = CPU
    parts: int = 3
    bytes_gathered: int = 0

    def allocate_resting(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8)


class Work:
    """A broadcast that has been issued."""

    def wait(self) -> None: ...


def make_unit(rank: Rank, values: list[Tensor]) -> tuple[RoutedUnit, list[nn.Parameter]]:
    metas = [nn.Parameter(value.to("meta"), False) for value in values]
    unit = RoutedUnit([ShardedParameter(meta, rank.parts) for meta in metas], EXPERTS, rank)
    whole = []
    for slot, value in zip(unit.slots, values, strict=True):
        rows = value[row_span(len(value), rank.parts, rank.index).slice]
        whole.append(slot.fill_local_rows(rows))
    return unit, whole


@pytest.mark.parametrize("experts", [(0, 1, 2, 3, 4), (1, 2, 4), (3,)])
def test_rows_of_all_ranks_make_the_experts(
    experts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every rank gets exactly the rows of ``experts``, counted in bytes, and frees them."""
    torch.manual_seed(0)
    values = [torch.randint(0, 256, shape, dtype=torch.uint8) for shape in SHAPES]
    sent: dict[int, Tensor] = {}
    ranks = [Rank(index) for index in range(3)]
    units = [make_unit(rank, values) for rank in ranks]

    def broadcast(buffer: Tensor, *, group: Any, async_op: bool, group_src: int) -> Work:
        if group_src in sent and sent[group_src] is not buffer:
            assert buffer.shape == sent[group_src].shape
            buffer.copy_(sent[group_src])
        return Work()

    monkeypatch.setattr(routed_gather.dist, "broadcast", broadcast)
    for turn in ("issue", "receive"):  # what each rank sends is known after the first turn
        for rank, (unit, _) in zip(ranks, units, strict=True):
            rank.bytes_gathered = 0
            unit.free_full_tensors()
            unit.start_gather(experts)
            if turn == "issue":
                assert unit.pending is not None
                sent |= {s: b for s, b, _ in unit.pending if s == rank.index}
    for rank, (unit, parameters) in zip(ranks, units, strict=True):
        unit.wait_gathered()
        size = sum(value.nbytes for value in values)
        assert unit.whole and rank.bytes_gathered == size * len(experts) // EXPERTS
        for parameter, value in zip(parameters, values, strict=True):
            got, wanted = (t.view(EXPERTS, -1)[list(experts)] for t in (parameter, value))
            assert torch.equal(got, wanted)
        unit.free_full_tensors()
        assert not any(p.untyped_storage().nbytes() for p in parameters)
        assert unit.gathered is None and not unit.whole


def test_the_same_set_is_not_gathered_again() -> None:
    rank = Rank(0, parts=1)
    unit, _ = make_unit(rank, [torch.zeros(shape, dtype=torch.uint8) for shape in SHAPES])
    for experts, times in (((0, 2), 1), ((0, 2), 1), ((0, 3), 2)):
        unit.start_gather(experts)
        unit.wait_gathered()
        assert rank.bytes_gathered == times * 2 * sum(r * c for r, c in SHAPES) // EXPERTS


def test_neighbors_are_one_run() -> None:
    runs = list(routed_gather._iterate_runs((0, 1, 3, 6, 7)))
    assert runs == [Span(0, 2), Span(3, 4), Span(6, 8)]
    assert not list(routed_gather._iterate_runs(()))


def test_experts_of_an_even_router() -> None:
    """Against the mean over drawn routings, to half an expert; the bounds exactly."""
    generator = torch.Generator().manual_seed(0)
    for experts, chosen, tokens in ((64, 4, 10), (32, 2, 40), (256, 8, 16)):
        scores = torch.rand(200, tokens, experts, generator=generator)
        used = [len(draw.topk(chosen, -1).indices.unique()) for draw in scores]
        found = expect_routed(experts, chosen, tokens)
        assert abs(found - 0.5 - sum(used) / len(used)) < 1.0
    assert expect_routed(8, 2, 0) == 0 and expect_routed(8, 2, 1) == 2
    assert expect_routed(8, 8, 1) == 8 and expect_routed(256, 8, 10**6) == 256


def test_a_first_pass_reads_one_list_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which experts are gathered and the counts of their rows; backward reads nothing."""
    torch.manual_seed(0)
    codec, hidden, inner = RawCodec(torch.float32), 8, 6
    stacks = {
        "gate_up_proj": ExpertStack(EXPERTS, hidden, 2 * inner, codec, "gate_up", "meta"),
        "down_proj": ExpertStack(EXPERTS, inner, hidden, codec, "down", "meta"),
    }
    values = [
        codec.quantize_to_packed(torch.randn(stack.packed.shape[0], stack.in_features))
        for stack in stacks.values()
    ]
    unit, whole = make_unit(Rank(0, parts=1), values)
    for stack, packed in zip(stacks.values(), whole, strict=True):
        stack.packed = packed
    experts = FrozenExperts(stacks, act_fn=nn.SiLU())
    block = nn.Sequential(experts)
    hooks = routed_gather._RoutedHooks(experts, unit, None)
    experts.register_forward_pre_hook(hooks.before_forward)
    experts.register_forward_hook(hooks.after_forward)
    lists: list[Any] = []
    own = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda self: lists.append(own(self)) or lists[-1])
    inputs = (torch.randn(6, hidden, requires_grad=True), torch.randint(3, (6, 2)))
    hooks.begin_block(block, ())
    y = experts(*inputs, torch.ones(6, 2))
    y.sum().backward()
    ((chosen, counts),) = lists
    assert sum(counts) == 12 and [count > 0 for count in counts] == [m > 0 for m in chosen]
    assert unit.gathered is None and y.any() and inputs[0].grad is not None
