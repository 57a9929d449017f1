"""Groups that share the rows, and the modules at both ends."""

import pytest
from torch import nn

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


def test_node_is_the_ranks_of_a_host() -> None:
    config = EngineConfig(shard_group="node")
    with pytest.raises(UserError, match="is 4 ranks, which does not divide the 6 ranks"):
        build_shard_mesh(config, World(rank=0, size=6, local_rank=0, local_size=4), CPU)


@pytest.mark.parametrize(("group", "ranks"), [(2, 3), (5, 3), (4, 6)])
def test_group_that_does_not_divide_is_refused(group: int, ranks: int) -> None:
    with pytest.raises(UserError, match=r"engine\.shard_group is \d ranks, which does not divide"):
        build_shard_mesh(EngineConfig(shard_group=group), World(rank=0, size=ranks), CPU)


def test_tied_ends_are_no_units() -> None:
    model = Model()
    assert list_end_modules(model) == [model.embedding, model.head]
    model.head = nn.Linear(64, 33, bias=False, device="meta")
    model.head.weight = model.embedding.weight
    assert list_end_modules(model) == []


def test_a_classifier_has_no_output_embedding(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model()
    monkeypatch.setattr(model, "get_output_embeddings", lambda: None)
    assert list_end_modules(model) == [model.embedding]
