"""FSDP2 on packed bytes: spans, bytes on the wire, storage, HSDP; real processes, uneven rows."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dist_peft.core.config import EngineConfig
from dist_peft.core.errors import UserError
from dist_peft.core.span import row_span
from dist_peft.core.world import World
from dist_peft.engine.base import trainable
from dist_peft.engine.fsdp2 import Fsdp2Engine
from dist_peft.engine.recompute import checkpoint_blocks
from dist_peft.engine.single import SingleEngine
from dist_peft.model.frozen_linear import FrozenLinear
from dist_peft.quant.codec import RawCodec
from dist_peft.quant.nf4 import Nf4Codec
from tests.dist import run_ranks

CPU = torch.device("cpu")
WIDTH, HIDDEN, VOCAB, BLOCKS = 64, 101, 33, 3


class Block(nn.Module):
    """Two frozen linears (101 and 64 rows) and a small trainable change."""

    def __init__(self) -> None:
        super().__init__()
        nf4, raw = Nf4Codec(64, double_quant=True), RawCodec(torch.float32)
        self.up = FrozenLinear(WIDTH, HIDDEN, nf4, False, torch.float32, "", "meta")
        self.down = FrozenLinear(HIDDEN, WIDTH, raw, True, torch.float32, "", "meta")
        self.change = nn.Parameter(torch.empty(WIDTH, WIDTH, device="meta"))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x))) + x @ self.change.T


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH, device="meta")
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        raw = RawCodec(torch.float32)
        self.head = FrozenLinear(WIDTH, VOCAB, raw, False, torch.float32, "", "meta")
        self.register_buffer("scale", torch.tensor(0.5), persistent=False)
        self.embedding.requires_grad_(False)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x * self.scale)


def whole_values() -> dict[str, Tensor]:
    """Every parameter's whole value, the same in each process."""
    values = {}
    for index, (name, parameter) in enumerate(Model().named_parameters()):
        generator = torch.Generator().manual_seed(index)
        if parameter.dtype == torch.uint8:
            linear = Model().get_submodule(name.rpartition(".")[0])
            assert isinstance(linear, FrozenLinear)
            weight = torch.randn(linear.out_features, linear.in_features, generator=generator)
            values[name] = linear.codec.encode(weight * 0.1)
        else:
            values[name] = torch.randn(parameter.shape, generator=generator) * 0.1
    return values


class Sgd:
    wants_plain = False

    def build(self, groups: list[dict]) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, lr=1.0)


@dataclass
class Outcome:
    losses: list[float]
    parameters: dict[str, Tensor]
    local_bytes: int
    gathered: list[int]


def train(world: World, config: EngineConfig, micro: int, recompute: bool = False) -> Outcome:
    """Three steps of 12 rows; what comes out must not depend on the world."""
    engine = SingleEngine(CPU) if world.size == 1 else Fsdp2Engine(config, world, CPU)
    model, values = Model(), whole_values()
    if recompute:
        checkpoint_blocks(list(model.blocks))
    engine.shard(model, list(model.blocks))
    for path, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            value = values[f"{path}.{name}" if path else name]
            engine.fill(module, name, value[engine.span(parameter).slice].clone())
    engine.optimize(model, Sgd(), lambda name: 1.0)
    local = sum(
        (p.to_local() if isinstance(p, DTensor) else p).numel() * p.element_size()
        for p in model.parameters()
    )
    losses, gathered = [], []
    for step in range(3):
        ids = torch.randint(VOCAB, (12, 5), generator=torch.Generator().manual_seed(step))
        mine = ids[world.rank :: world.size].split(micro)
        total, before = 0.0, engine.bytes_gathered
        for number, rows in enumerate(mine):
            loss = model(rows).square().sum() / ids.numel()
            total += loss.item()
            engine.backward(loss, last=number == len(mine) - 1)
        losses.append(world.sum(total)[0])
        assert engine.step(lr=0.05, max_norm=1.0) > 0
        gathered.append(engine.bytes_gathered - before)
    parameters = {name: engine.gather(p) for name, p in model.named_parameters()}
    for name, parameter in parameters.items():
        if name not in trainable(model):
            assert torch.equal(parameter, values[name]), f"{name} changed"
    return Outcome(losses, parameters, local, gathered)


@pytest.mark.dist
@pytest.mark.parametrize(
    ("ranks", "changes", "micro", "recompute"),
    [
        (2, {}, 6, False),
        (3, {}, 4, False),
        (3, {}, 2, True),
        (2, {"shard_base": False}, 3, False),
        (4, {"shard_group": 2}, 3, False),
    ],
    ids=["2", "3 uneven", "3 accumulating, recomputing", "unsharded base", "HSDP 2x2"],
)
def test_equals_single(ranks: int, changes: dict, micro: int, recompute: bool) -> None:
    config = EngineConfig(**changes)
    expected = train(World(), config, micro=12)
    for outcome in run_ranks(train, ranks, config, micro, recompute):
        torch.testing.assert_close(
            torch.tensor(outcome.losses), torch.tensor(expected.losses), rtol=1e-6, atol=0
        )
        for name, parameter in outcome.parameters.items():
            torch.testing.assert_close(
                parameter, expected.parameters[name], rtol=1e-5, atol=1e-7, msg=name
            )


def padded_bytes(parts: int, prefix: str) -> int:
    """What one gather of the parameters under ``prefix`` brings, rows padded to equal shards."""
    total = 0
    for name, p in Model().named_parameters():
        if name.startswith(prefix):
            rows = -(-p.shape[0] // parts) * parts
            total += rows * p.shape[1:].numel() * p.element_size()
    return total


@pytest.mark.dist
def test_bytes_gathered_are_packed_bytes_times_passes() -> None:
    """Blocks travel for forward and for backward; embedding and head (released too) likewise,
    but the embedding's backward needs no weight."""
    ranks, micro_steps = 3, 2
    expected = micro_steps * (
        2 * padded_bytes(ranks, "blocks.")
        + 2 * padded_bytes(ranks, "head.")
        + padded_bytes(ranks, "embedding.")
    )
    for outcome in run_ranks(train, ranks, EngineConfig(), 2):
        assert outcome.gathered == [expected] * 3


@pytest.mark.dist
def test_each_rank_rests_on_its_own_rows() -> None:
    ranks = 3
    for rank, outcome in enumerate(run_ranks(train, ranks, EngineConfig(), 4)):
        expected = sum(
            len(row_span(p.shape[0], ranks, rank)) * p.shape[1:].numel() * p.element_size()
            for p in Model().parameters()
        )
        assert outcome.local_bytes == expected


def _bad_group(world: World) -> None:
    with pytest.raises(UserError, match=r"engine\.shard_group is 2 ranks, which does not divide"):
        Fsdp2Engine(EngineConfig(shard_group=2), world, CPU)


@pytest.mark.dist
def test_group_that_does_not_divide_is_refused() -> None:
    run_ranks(_bad_group, 3)
