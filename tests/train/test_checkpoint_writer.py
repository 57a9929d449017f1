"""Staging, the exchange of outcomes, and what a rank's missing shard does."""

from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.distributed.tensor import DTensor

from dist_peft.core.errors import UserError
from dist_peft.core.world import World
from dist_peft.engine.flat_shard import FlatShard
from dist_peft.train import checkpoint_writer
from dist_peft.train.checkpoint import CheckpointManager
from dist_peft.train.checkpoint_verify import find_checkpoint_damage
from dist_peft.train.checkpoint_writer import BackgroundWrite, StagedState
from tests.support.checkpoints import (
    make_flat_state,
    make_position,
    make_sharded_state,
    make_whole_state,
)
from tests.support.dist import run_ranks


def test_staged_values_are_those_of_the_call() -> None:
    state = make_whole_state(1)
    staged = StagedState(state, True)
    items = staged.create_local_plan().items
    for tensor in state.values():
        tensor.zero_()
    for item in items:
        assert torch.equal(staged.resolve_data(item), make_whole_state(1)[item.index.fqn])
    assert staged.num_bytes == 3 * 7 * 5 * 4


def save_parts_of_elements(world: World, directory: Path) -> int:
    """Save what each rank holds of flat tensors, overwrite it, read the whole; bytes staged."""
    checkpoints = CheckpointManager(directory, 2, world, asynchronous=True)
    state = make_flat_state(world, 1)
    path = checkpoints.save_checkpoint(state, make_position(1))
    for value in state.values():
        (value.values if isinstance(value, FlatShard) else value).zero_()
    checkpoints.finish_writing()
    expected = make_whole_state(1)
    loaded = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    assert find_checkpoint_damage(path, world) is None
    checkpoints.load_checkpoint(path, loaded)
    for name, tensor in expected.items():
        assert torch.equal(loaded[name], tensor), name
    rows = make_sharded_state(world, 2)  # as another engine resumes
    checkpoints.load_checkpoint(path, rows)
    for name, tensor in rows.items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        assert torch.equal(whole, expected[name]), name
    return StagedState(make_flat_state(world, 1), world.is_first).num_bytes


@pytest.mark.dist
@pytest.mark.parametrize("ranks", [1, 3])
def test_parts_of_elements_are_one_tensor(tmp_path: Path, ranks: int) -> None:
    staged = run_ranks(save_parts_of_elements, ranks, tmp_path)
    whole = 7 * 5 * 4  # of each tensor; start/b is whole on every rank
    assert sum(staged) == (2 + ranks) * whole
    assert max(staged) <= whole + 2 * -(-35 // ranks) * 4


def test_a_background_write_raises_where_it_is_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise UserError("full")

    write = BackgroundWrite(fail)
    write.abandon(10)
    assert write.has_failed and "abandoned" not in caplog.text
    with pytest.raises(UserError, match="full"):
        write.finish()


@mock.patch.object(checkpoint_writer, "SEEN_SECONDS", 0.2)
def save_to_own_directories(world: World, directory: Path) -> list[str]:
    """Every rank has another directory; and one in which rank 1 cannot write."""
    texts = []
    for asynchronous in (False, True):
        own = directory / str(world.rank)
        checkpoints = CheckpointManager(own, 2, world, asynchronous=asynchronous)
        (own / ".partial-step-000001").mkdir(parents=True, exist_ok=True)
        with pytest.raises(UserError) as caught, checkpoints.writes_finished():
            checkpoints.save_checkpoint(make_sharded_state(world, 1), make_position(1))
        texts.append(str(caught.value))
    assert not list((directory / str(world.rank)).iterdir())
    checkpoints = CheckpointManager(directory / "shared", 2, world, asynchronous=True)
    save = fill_disk if world.rank == 1 else torch.save
    with (
        mock.patch.object(torch, "save", save),
        pytest.raises(UserError) as caught,
        checkpoints.writes_finished(),
    ):
        checkpoints.save_checkpoint(make_sharded_state(world, 1), make_position(1))
    return [*texts, str(caught.value)]


def fill_disk(*args: object, **kwargs: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.dist
def test_shards_that_rank_0_does_not_see_are_not_published(tmp_path: Path) -> None:
    answers = run_ranks(save_to_own_directories, 2, tmp_path)
    assert answers[0] == answers[1]
    *unseen, full = answers[0]
    for text in unseen:
        assert "is not published: rank 1 wrote __1_0.distcp, which rank 0" in text
    assert "cannot write checkpoint" in full and "No space left" in full
    assert not list((tmp_path / "shared").iterdir())
