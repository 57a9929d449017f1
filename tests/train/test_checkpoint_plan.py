"""A plan as JSON: what comes back is what ``dcp.save`` would have written."""

import json
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from dist_peft.core.world import RemoteError, World
from dist_peft.train import checkpoint_plan
from dist_peft.train.checkpoint_plan import _decode_item, save_shards
from dist_peft.train.checkpoint_reader import CheckpointReader
from dist_peft.train.checkpoint_writer import StagedState
from tests.support.dist import run_ranks
from tests.support.pickles import count_pickles


def make_state(world: World) -> dict[str, Any]:
    """Uneven shards, shards that two groups of ranks replicate, and whole tensors on all ranks."""
    state: dict[str, Any] = {"whole": torch.arange(6.0), "scalar": torch.tensor(3.0)}
    if world.size > 1:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "shard"))
        rows = torch.arange(10.0).view(5, 2)
        own = rows[:3] if world.rank % 2 == 0 else rows[3:]
        places = [Replicate(), Shard(0)]
        state["sharded/a.b"] = DTensor.from_local(
            own, mesh, places, run_check=False, shape=rows.shape, stride=rows.stride()
        )
    return state


def save_both_ways(world: World, directory: Path) -> list[Any]:
    state = make_state(world)
    staged = StagedState(state, world.is_first)
    with count_pickles() as pickles:
        save_shards(dcp.FileSystemWriter(directory / "json"), staged, None)
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    options: dict[str, Any] = {} if world.size > 1 else {"no_dist": True}
    writer = dcp.FileSystemWriter(directory / "pickle")
    dcp.save({}, storage_writer=writer, planner=StagedState(state, world.is_first), **options)
    return pickles


@pytest.mark.dist
@pytest.mark.parametrize("ranks", [1, 4])
def test_files_are_those_of_torch(tmp_path: Path, ranks: int) -> None:
    assert run_ranks(save_both_ways, ranks, tmp_path) == [[]] * ranks
    mine, torchs = tmp_path / "json", tmp_path / "pickle"
    assert {p.name for p in mine.iterdir()} == {p.name for p in torchs.iterdir()}
    found, wanted = (CheckpointReader(p).read_metadata() for p in (mine, torchs))
    assert found.state_dict_metadata == wanted.state_dict_metadata
    assert found.storage_data == wanted.storage_data
    assert found.planner_data == wanted.planner_data
    for file in mine.glob("*.distcp"):
        assert file.read_bytes() == (torchs / file.name).read_bytes()


def fail_on_one(world: World, directory: Path) -> str:
    staged = StagedState({"a": torch.ones(3)}, world.is_first)
    write = fail if world.rank == 1 else checkpoint_plan._write_data
    with (
        mock.patch.object(checkpoint_plan, "_write_data", write),
        pytest.raises((RemoteError, ZeroDivisionError)) as caught,
    ):
        save_shards(dcp.FileSystemWriter(directory), staged, dist.group.WORLD)
    return str(caught.value)


def fail(*_: Any) -> None:
    raise ZeroDivisionError("a bug")


@pytest.mark.dist
def test_error_of_one_rank_is_every_ranks(tmp_path: Path) -> None:
    told = run_ranks(fail_on_one, 2, tmp_path)
    assert told == ["rank 1 failed to write a checkpoint: a bug", "a bug"]


@pytest.mark.parametrize("dtype", ["load", "nn", "float33"])
def test_no_attribute_of_torch_but_a_type_is_taken(dtype: str) -> None:
    item = json.loads(json.dumps(["a", None, None, "TENSOR", [0], [1], [1], dtype]))
    with pytest.raises(ValueError, match=f"{dtype} is no type of a tensor"):
        _decode_item(item)
