"""Groups that share the rows, and the modules at both ends."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from dist_peft.core.config.run import EngineConfig
from dist_peft.core.errors import UserError
from dist_peft.core.world import World
from dist_peft.engine.mesh import build_shard_mesh, list_end_modules
from tests.support.dist import run_ranks
from tests.support.tiny_engines import CPU, Model


def meshes(world: World) -> list[tuple[int, int]]:
    """Size of the shard group and this rank's place in it, for each way to ask."""
    result = []
    for group in ("all", 4, 2, 1):
        mesh = build_shard_mesh(EngineConfig(shard_group=group), world, CPU)
        result.append((mesh["shard"].size(), mesh["shard"].get_local_rank()))
    return result


@pytest.mark.dist
def test_groups_are_consecutive_ranks() -> None:
    for rank, found in enumerate(run_ranks(meshes, 4)):
        assert found == [(4, rank), (4, rank), (2, rank % 2), (1, 0)]


def limits(world: World) -> list[list[timedelta]]:
    """The time limit of each group of the mesh, for one group and for two levels of groups."""
    found = []
    for group in ("all", 2):
        mesh = build_shard_mesh(EngineConfig(shard_group=group, timeout_minutes=3), world, CPU)
        groups = [mesh.get_group(name) for name in mesh.mesh_dim_names or ()]
        found.append([g._get_backend(CPU).options._timeout for g in groups])
        total = torch.full((1,), float(world.rank))
        for g in groups:
            dist.all_reduce(total, group=g)
        assert total.item() == 6
    return found


@pytest.mark.dist
def test_groups_obey_the_time_limit() -> None:
    joined, made = timedelta(minutes=2), timedelta(minutes=3)  # run_ranks joins with 2
    assert run_ranks(limits, 4) == [[[joined], [made, made]]] * 4


@pytest.mark.parametrize(
    ("hosts", "message"),
    [
        (["a", "b", "a", "b"], r"dealt ranks to hosts in turn \(rank 0 on a, rank 1 on b, "),
        (["a", "a", "a", "b"], r"equally many ranks on every host; here there are 3 on a, 1 on b"),
        (["a", "a", "a", "a", "a", "b"], "equally many ranks on every host"),
        (["a", "a", "a", "b", "b", "b"], "takes 2 ranks, which the launcher calls those of a host"),
    ],
)
def test_node_is_refused_where_ranks_of_a_group_share_no_host(
    hosts: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(World, "rank_hosts", hosts)
    world = World(rank=0, size=len(hosts), local_rank=0, local_size=2)
    with pytest.raises(UserError, match=message):
        build_shard_mesh(EngineConfig(shard_group="node"), world, CPU)


def test_node_is_the_ranks_of_a_host() -> None:
    config = EngineConfig(shard_group="node")
    with pytest.raises(UserError, match="is 4 ranks, which does not divide the 6 ranks"):
        build_shard_mesh(config, World(rank=0, size=6, local_rank=0, local_size=4), CPU)


@pytest.mark.parametrize(("group", "ranks"), [(2, 3), (5, 3), (4, 6)])
def test_group_that_does_not_divide_is_refused(group: int, ranks: int) -> None:
    with pytest.raises(UserError, match=r"engine\.shard_group is \d ranks, which does not divide"):
        build_shard_mesh(EngineConfig(shard_group=group), World(rank=0, size=ranks), CPU)


def test_ends_of_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model()
    assert list_end_modules(model) == [model.embedding, model.head]
    monkeypatch.setattr(model, "get_output_embeddings", model.get_input_embeddings)
    assert list_end_modules(model) == [model.embedding]


def test_a_classifier_has_no_output_embedding(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model()
    monkeypatch.setattr(model, "get_output_embeddings", lambda: None)
    assert list_end_modules(model) == [model.embedding]
