"""Copies that drift apart are found and named; what is not shared is not compared."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from dist_peft.core.errors import UserError
from dist_peft.core.span import Span, row_span
from dist_peft.core.world import RemoteError, World
from dist_peft.engine.replicas import ReplicaCheck
from dist_peft.engine.single import SingleEngine
from tests.support.dist import run_ranks

CPU = torch.device("cpu")
FACTS = {"step": 3, "train.lr": 0.1}


class Model(nn.Module):
    """Two parameters, one of them frozen, and both kinds of buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 5, bias=False)
        self.frozen = nn.Parameter(torch.ones(4), requires_grad=False)
        self.register_buffer("kept", torch.ones(2))
        self.register_buffer("scratch", torch.ones(2), persistent=False)
        nn.init.ones_(self.inner.weight)


def compare(model: nn.Module, world: World, engine: Any = None, **options: Any) -> str:
    check = ReplicaCheck(model, engine or SingleEngine(CPU), world)
    facts = options.pop("facts", FACTS)
    try:
        check.compare_replicas(facts, **options)
    except RemoteError as error:
        return str(error)
    return f"{check.bytes_hashed} bytes"


def _whole(world: World) -> list[str]:
    texts = [compare(Model(), world), compare(Model(), world, everything=True)]
    for name, everything in (
        ("inner.weight", False),
        ("kept", False),
        ("scratch", False),
        ("scratch", True),
        ("frozen", False),
        ("frozen", True),
    ):
        model = Model()
        tensor: Tensor = model.get_parameter(name) if name[0] in "if" else model.get_buffer(name)
        if world.rank == 1:
            tensor.data.view(-1)[-1] += 2**-20  # a low bit
        texts.append(compare(model, world, everything=everything))
    texts.append(compare(Model(), world, facts={**FACTS, "step": 3 + world.rank // 2}))
    model = Model()
    if world.rank == 2:
        model.register_buffer("more", torch.ones(1))
    texts.append(compare(model, world))
    return texts


@pytest.mark.dist
def test_whole_copies() -> None:
    results = run_ranks(_whole, 3)
    assert results[0] == results[1] == results[2]
    equal, everything, weight, kept, scratch, scratch_too, frozen, frozen_too, step, more = results[
        0
    ]
    assert (equal, everything) == ("68 bytes", "92 bytes")
    assert "no longer agree on inner.weight: ranks 0, 2 against rank 1" in weight
    assert "no longer agree on kept" in kept and "no longer agree on scratch" in scratch_too
    assert "no longer agree on frozen" in frozen_too
    assert scratch == frozen == "68 bytes"  # not among what is compared at each check
    assert "no longer agree on step: ranks 0-1 against rank 2" in step
    assert "other tensors" in more and "ranks 0-1 against rank 2" in more


class Sharded(SingleEngine):
    """Rows over ``shards`` ranks, replicated across."""

    def __init__(self, shards: int, index: int) -> None:
        super().__init__(CPU)
        self.shards, self.index = shards, index

    def local_row_span(self, parameter: Tensor) -> Span:
        if not isinstance(parameter, DTensor):
            return super().local_row_span(parameter)
        return row_span(parameter.shape[0], self.shards, self.index)


def _rows(world: World, replicas: int, odd: int) -> str:
    """Rank ``odd`` has another value in its rows."""
    shards = world.size // replicas
    mesh = init_device_mesh("cpu", (replicas, shards))
    index, model = world.rank % shards, Model()
    local = torch.ones(5, 3)[row_span(5, shards, index).slice].clone()
    if world.rank == odd:
        local[0, 0] = 2
    places = [Replicate(), Shard(0)]
    whole = DTensor.from_local(
        local, mesh, places, run_check=False, shape=torch.Size((5, 3)), stride=(3, 1)
    )
    model.inner.weight = nn.Parameter(whole)
    return compare(model, world, Sharded(shards, index))


def _all_rows(world: World) -> list[str]:
    return [_rows(world, *case) for case in ((2, -1), (2, 3), (1, 1))]


@pytest.mark.dist
def test_rows_that_two_ranks_hold() -> None:
    """Four ranks: two copies of two uneven shards; then one copy, with nothing to compare."""
    results = run_ranks(_all_rows, 4)
    assert [result[0] for result in results] == ["44 bytes", "32 bytes", "44 bytes", "32 bytes"]
    for result in results:
        assert "ranks 1, 3 hold the same rows of inner.weight with other values" in result[1]
        assert result[2] == "8 bytes"  # the buffer alone


def test_one_process_compares_nothing() -> None:
    assert compare(Model(), World()) == "0 bytes"
    assert not issubclass(RemoteError, UserError)  # the machine's fault: exit code 1


class RowsOfRank(SingleEngine):
    """Rows of a sharded parameter by the rank; all of any other."""

    def __init__(self, world: World) -> None:
        super().__init__(CPU)
        self.world = world

    def local_row_span(self, parameter: Tensor) -> Span:
        size, rank = (
            (self.world.size, self.world.rank) if isinstance(parameter, DTensor) else (1, 0)
        )
        return row_span(parameter.shape[0], size, rank)


def _fewer_rows_than_ranks(world: World) -> str:
    model = Model()
    mesh = init_device_mesh("cpu", (world.size,))
    own = torch.ones(int(world.rank == 0), 3)  # rank 0 holds the only row
    shard = DTensor.from_local(own, mesh, [Shard(0)], shape=torch.Size([1, 3]), stride=(3, 1))
    model.inner.weight = nn.Parameter(shard)
    return compare(model, world, RowsOfRank(world))


@pytest.mark.dist
def test_fewer_rows_than_ranks_are_no_copies() -> None:
    """Such as the gate of a shared expert, one row: no rank has a copy, and no alarm comes."""
    assert run_ranks(_fewer_rows_than_ranks, 3) == ["8 bytes"] * 3
