"""Experts on their own ranks, to which rows travel: ranks are threads whose collectives meet."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dist_peft.adapters.lora.expert_layer import LoraExperts
from dist_peft.adapters.low_rank.module import LowRankSpec
from dist_peft.engine import token_exchange
from dist_peft.engine.token_exchange import OwnedStack, TokenExchange
from dist_peft.model.expert_variants import ScaledInputExperts
from dist_peft.model.experts import ExpertStack, FrozenExperts
from dist_peft.model.sample_dropout import DropoutPosition, SampleDropout
from dist_peft.quant.assumed_device import assume_device
from dist_peft.quant.nf4 import Nf4Codec

E, HIDDEN, INNER, R, K = 5, 16, 24, 3, 2
TOKENS = (7, 0, 4)
"""Of each rank: one has none."""

NAMES = (("gate_up_proj", 2 * INNER, HIDDEN), ("down_proj", HIDDEN, INNER))
CODEC = Nf4Codec(16)
CPU = torch.device("cpu")


class Meeting:
    """What the ranks of a collective bring."""

    def __init__(self, ranks: int) -> None:
        self.barrier = threading.Barrier(ranks, timeout=60)
        self.brought: dict[int, Any] = {}

    def share(self, rank: int, value: Any) -> dict[int, Any]:
        self.brought[rank] = value
        self.barrier.wait()
        found = dict(self.brought)
        self.barrier.wait()
        return found


@dataclass
class Rank:
    index: int
    parts: int
    meeting: Meeting
    device: torch.device = CPU
    bytes_gathered: int = 0
    collectives: list[str] = field(default_factory=list)

    @property
    def group(self) -> Any:
        return self

    def allocate_resting(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8)


def all_gather(output: Tensor, data: Tensor, group: Rank) -> None:
    group.collectives.append("gather")
    found = group.meeting.share(group.index, data.clone())
    output.copy_(torch.cat([found[rank] for rank in range(group.parts)]))


def all_to_all(output: Tensor, data: Tensor, receive: Any, send: Any, group: Rank) -> None:
    group.collectives.append("exchange")
    found = group.meeting.share(group.index, data.split(send))
    pieces = [found[rank][group.index] for rank in range(group.parts)]
    assert [len(piece) for piece in pieces] == list(receive)
    output.copy_(torch.cat(pieces))


def make_experts(kind: type[FrozenExperts], owner: Rank | None, dropout: float) -> FrozenExperts:
    """With biases and LoRA; for ``owner`` those of its own experts, from the same numbers."""
    generator = torch.Generator().manual_seed(0)
    position = DropoutPosition(7)
    stacks, packed = {}, {}
    for name, out, columns in NAMES:
        weight = torch.randn(E * out, columns, generator=generator) / columns**0.5
        packed[name] = CODEC.quantize_to_packed(weight)
        stacks[name] = ExpertStack(E, columns, out, CODEC, name, "cpu" if owner is None else "meta")
        if owner is None:
            stacks[name].packed.data = packed[name]
    biased = kind is FrozenExperts
    experts = kind(stacks, nn.SiLU(), bias_dtype=torch.float32 if biased else None)
    spec = LowRankSpec(R, 0.5, torch.float32, seed=3)
    for (name, *_), stack in zip(NAMES, stacks.values(), strict=True):
        layer = LoraExperts(stack, name, spec, SampleDropout(dropout, name, position), "cpu")
        for parameter in (layer.lora_A, layer.lora_B):
            nn.init.normal_(parameter, std=0.3, generator=generator)
        experts.set_submodule(name, layer)
        bias = experts._parameters[f"{name}_bias"]
        if bias is not None:
            shape = (E, stack.out_features)
            bias = nn.Parameter(torch.randn(shape, generator=generator), False)
            experts.register_parameter(f"{name}_bias", bias)
    if owner is not None:
        for name, stack in stacks.items():
            slot = OwnedStack(stack, owner)
            rows = packed[name][slot.get_row_span(owner.index).slice]
            stack.packed = slot.fill_local_rows(rows)
        experts.exchange = TokenExchange(experts, owner)
    vars(experts)["position"] = position
    return experts


def make_inputs(kind: type[FrozenExperts], rank: int) -> list[Tensor]:
    """Rows of a rank; expert 1 gets none."""
    generator, count = torch.Generator().manual_seed(10 + rank), TOKENS[rank]
    x = torch.randn(count, HIDDEN, generator=generator)
    index = torch.tensor([0, 2, 3, 4])[torch.randint(4, (count, K), generator=generator)]
    if kind is FrozenExperts:
        return [x, index, torch.rand(count, K, generator=generator)]
    chosen = torch.zeros(E, count).scatter_(0, index[:, :1].T, 1.0)
    return [(chosen[:, :, None] * x).flatten(0, 1)]


def compute(experts: Any, inputs: list[Tensor], rank: int) -> dict[str, Tensor]:
    """Outputs, and gradients of inputs and factors."""
    experts.position.begin_micro_batch(3, torch.tensor([rank]))
    leaves = [t.clone().requires_grad_() if t.is_floating_point() else t for t in inputs]
    y = experts(*leaves)
    y.square().sum().backward()
    found = {"y": y.detach(), **{str(i): t.grad for i, t in enumerate(leaves) if t.requires_grad}}
    return found | {n: p.grad for n, p in experts.named_parameters() if p.requires_grad}


def on_ranks(
    parts: int, monkeypatch: pytest.MonkeyPatch, work: Callable[[Rank], Any]
) -> list[tuple[Rank, Any]]:
    """Run ``work`` on ranks that are threads."""
    monkeypatch.setattr(token_exchange, "all_gather", all_gather)
    monkeypatch.setattr(token_exchange.dist, "all_to_all_single", all_to_all)
    meeting = Meeting(parts)
    ranks = [Rank(index, parts, meeting) for index in range(parts)]
    found: dict[int, Any] = {}

    def run(rank: Rank) -> None:
        try:
            found[rank.index] = work(rank)
        except BaseException:
            meeting.barrier.abort()
            raise

    threads = [threading.Thread(target=run, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [(rank, found[rank.index]) for rank in ranks]


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("kind", [FrozenExperts, ScaledInputExperts])
def test_equals_experts_on_one_rank(
    kind: type[FrozenExperts], dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five experts on three ranks (2, 2, 1), one of which has no token: outputs and gradients of
    each rank's rows, and the sum of the factors' over ranks. The same bits a second time."""

    def work(rank: Rank) -> dict[str, Tensor]:
        inputs = make_inputs(kind, rank.index)
        return compute(make_experts(kind, rank, dropout), inputs, rank.index)

    results = on_ranks(3, monkeypatch, work)
    again = on_ranks(3, monkeypatch, work)
    alone = make_experts(kind, None, dropout)
    for number, (rank, found) in enumerate(results):
        alone.zero_grad()
        wanted = compute(alone, make_inputs(kind, number), number)
        own = [name for name in wanted if "lora" not in name]
        assert own[0] == "y" and found.keys() == wanted.keys()
        for name in own:
            torch.testing.assert_close(found[name], wanted[name], rtol=1e-5, atol=1e-5)
        assert all(torch.equal(found[name], again[number][1][name]) for name in found)
        keys = ["exchange"] if dropout else []
        moves = ["exchange"] * 2
        pairs = ["exchange"] if kind is FrozenExperts else []  # with the router's weights
        assert rank.collectives == ["gather", *pairs, *keys, *moves, *moves, *pairs]
    alone.zero_grad()
    for number in range(3):
        alone_grads = compute(alone, make_inputs(kind, number), number)
    for name in (n for n in alone_grads if "lora" in n):
        total = sum(found[name] for _, found in results)
        torch.testing.assert_close(total, alone_grads[name], rtol=1e-5, atol=1e-4)


def test_what_travels_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that a rank receives: to its experts and back, in forward and in backward. A token is
    sent once to a rank that has both of its experts, with 8 bytes for each expert, and 4 back."""
    for kind in (FrozenExperts, ScaledInputExperts):

        def work(rank: Rank, kind: type[FrozenExperts] = kind) -> None:
            compute(make_experts(kind, rank, 0.0), make_inputs(kind, rank.index), rank.index)

        total = sum(rank.bytes_gathered for rank, _ in on_ranks(3, monkeypatch, work))
        rows, pairs = sum(TOKENS), 0
        if kind is FrozenExperts:
            index = [make_inputs(kind, rank)[1] // 2 for rank in range(3)]
            rows = sum(len(set(ranks)) for chosen in index for ranks in chosen.tolist())
            pairs = sum(TOKENS) * K
            assert rows < pairs
        assert total == 4 * rows * HIDDEN * 4 + 12 * pairs


@pytest.mark.parametrize("parts", [1, 3, 7])
def test_whole_experts_on_each_rank(parts: int) -> None:
    """Rows of all ranks are those of the stack; ranks beyond the experts have none."""
    rows = torch.arange(E * 6 * 4, dtype=torch.uint8).view(E * 6, 4)
    kept = []
    for index in range(parts):
        stack = ExpertStack(E, 8, 6, CODEC, "stack", "meta")
        stack.packed = nn.Parameter(rows.to("meta"), requires_grad=False)
        slot = OwnedStack(stack, Rank(index, parts, Meeting(parts)))
        span = slot.get_row_span(index)
        assert span.start % 6 == span.stop % 6 == 0
        whole = slot.fill_local_rows(rows[span.slice])
        assert whole.shape == rows.shape and not whole.untyped_storage().nbytes()
        assert stack.own_rows is not None and not list(stack.parameters())[1:]
        assert len(stack.own_rows) == 6 * len(stack.own_experts)
        kept.append(stack.own_rows)
    assert torch.equal(torch.cat(kept), rows)


def test_one_rank_sends_nothing() -> None:
    rank = Rank(0, 1, Meeting(1))
    experts, alone = (make_experts(FrozenExperts, owner, 0.4) for owner in (rank, None))
    inputs = make_inputs(FrozenExperts, 0)
    found, wanted = compute(experts, inputs, 0), compute(alone, inputs, 0)
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    assert not rank.bytes_gathered and not rank.collectives


def test_a_trace_has_even_shares() -> None:
    """A plan's ranks get their experts' share of the rows of all, and send nothing."""
    rank = Rank(1, 3, Meeting(3))
    experts = make_experts(FrozenExperts, rank, 0.0)
    with assume_device(CPU):
        assert experts.exchange is not None
        routes: Any = experts.exchange.plan_routes(torch.zeros(E, dtype=torch.long), 10)
    assert routes.groups.num_rows == 10 and routes.wire.receive == [12]
    assert routes.received.counts == (0, 0, 6, 6, 0) and len(routes.order) == 12
    with assume_device(CPU), FakeTensorMode():
        x, chosen = torch.empty(5, HIDDEN), torch.empty(5, K, dtype=torch.long)
        sums = experts.exchange.compute_joined(x, chosen, torch.rand(5, K), lambda x, *_: 2 * x)
    # 0.7 of the tokens choose one of two experts, 0.4 the last one; one rank of three gets a third
    assert sums.shape == x.shape
    assert rank.bytes_gathered == 8 * 12 + (3 * 4 + 4 + 4 + 2) * HIDDEN * 4
