"""Connecting, agreement between real ranks, and who is to blame when one dies."""

import os
import re
import signal
import time
from datetime import timedelta
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from dist_peft.core import world as world_module
from dist_peft.core.errors import UserError
from dist_peft.core.stop_signals import StopRequested, catch_stop_signals
from dist_peft.core.world import RemoteError, RendezvousError, World
from tests.support.dist import run_ranks


def test_device() -> None:
    assert World().select_device("cpu") == torch.device("cpu")
    if not torch.cuda.is_available():
        assert World().select_device("auto") == torch.device("cpu")
        with pytest.raises(UserError, match=r"train\.device is cuda"):
            World().select_device("cuda")


@pytest.mark.parametrize(
    ("visible", "local_rank", "expected"), [(1, 0, 0), (1, 3, 0), (4, 3, 3), (2, 3, None)]
)
def test_device_of_the_local_rank_or_the_only_one(
    visible: int, local_rank: int, expected: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One visible device: the launcher shows each task its own (``--gpus-per-task=1``)."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    world = World(local_rank, 4, local_rank, 4, "slurm", "127.0.0.1", 1)
    if expected is None:
        with pytest.raises(UserError, match="shows 2 CUDA devices; start at most 2 processes"):
            world.select_device("auto")
    else:
        assert world.select_device("cuda") == torch.device("cuda", expected)


def test_data_are_divided_by_data_parallel_ranks() -> None:
    """Every rank has a share of its own; code that divides data does not read ``rank``."""
    world = World(2, 3, 2, 3, "test", "127.0.0.1", 1)
    assert (world.data_rank, world.data_size) == (2, 3)
    package = Path(__file__).parents[2] / "dist_peft"
    # checkpoints divide files, which every rank has to read or write, whatever data it computes
    train = [p for p in package.glob("train/*.py") if not p.name.startswith("checkpoint")]
    divides = [*package.glob("data/*.py"), *train, package / "app/data_setup.py"]
    for path in divides:
        assert not re.search(r"world\.(rank|size)\b", path.read_text()), path


def _agree(world: World) -> None:
    assert world.any_rank(world.rank == 1)
    assert not world.any_rank(False)
    assert world.sum_over_ranks(1.0, world.rank) == [world.size, sum(range(world.size))]
    assert world.max_over_ranks(world.rank, -world.rank) == [world.size - 1, 0]
    world.barrier()
    with world.raise_together("nothing wrong"):
        pass


def _phase(world: World, first: int, error: Exception) -> None:
    with world.raise_together("work"):
        if world.rank >= first:
            raise error


def _users_error(world: World) -> None:
    with pytest.raises(UserError, match="row 7 of b is broken"):
        _phase(world, 1, UserError(f"row 7 of {'abc'[world.rank]} is broken"))
    dist.barrier()  # nobody was left behind in the phase


def _failure(world: World) -> None:
    expected = ZeroDivisionError if world.rank == 2 else RemoteError
    match = "boom" if world.rank == 2 else r"rank 2 failed in phase 'work': boom"
    with pytest.raises(expected, match=match):
        _phase(world, 2, ZeroDivisionError("boom"))


def _stop(world: World) -> None:
    with catch_stop_signals():
        if world.rank == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        with pytest.raises(StopRequested, match="stopped on SIGUSR1"):
            _phase(world, 1, StopRequested())  # of rank 1 and, without a signal, rank 2
        with pytest.raises(UserError, match="row 7"):
            _phase(world, 1, UserError("row 7") if world.rank == 2 else StopRequested())
        with pytest.raises(StopRequested):
            world.raise_if_stop_requested()


def _slow_first(world: World, directory: Path) -> str:
    def read_or_make() -> str:
        file = directory / "made"
        if not file.exists():
            time.sleep(2)
            file.write_text(f"by rank {world.rank}")
        return file.read_text()

    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=1), dist.group.WORLD)
    return world.run_node_first("make it", read_or_make)


@pytest.mark.dist
def test_ranks_agree() -> None:
    run_ranks(_agree, 3)


@pytest.mark.dist
def test_first_rank_of_a_node_may_take_longer_than_a_collective(tmp_path: Path) -> None:
    assert run_ranks(_slow_first, 3, tmp_path) == ["by rank 0"] * 3


@pytest.mark.dist
def test_error_of_one_is_error_of_all() -> None:
    run_ranks(_stop, 3)
    run_ranks(_users_error, 3)
    run_ranks(_failure, 3)


def _first_writes(world: World) -> list[int]:
    ran: list[int] = []
    world.run_on_first("write", lambda: ran.append(world.rank))

    def fail() -> None:
        raise UserError("the disk is full")

    with pytest.raises(UserError, match="the disk is full"):
        world.run_on_first("write", fail)
    return ran


@pytest.mark.dist
def test_first_rank_writes_and_its_error_is_every_ranks() -> None:
    assert run_ranks(_first_writes, 3) == [[0], [], []]


def test_one_process_raises_its_own() -> None:
    with pytest.raises(KeyError), World().raise_together("alone"):
        raise KeyError("x")


def test_from_env_is_the_place() -> None:
    assert World.detect_world({}) == World()
    env = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    env |= {"MASTER_ADDR": "node1", "MASTER_PORT": "1234"}
    assert World.detect_world(env) == World(1, 2, 1, 2, "environment", "node1", 1234)


def test_unreachable_master_is_named() -> None:
    world = World(1, 2, 1, 2, "torchrun", "127.0.0.1", 9)
    with pytest.raises(RendezvousError, match=r"could not reach rank 0 at 127\.0\.0\.1:9 within"):
        world.join_process_group(torch.device("cpu"), start_timeout_minutes=0.01)


def test_batch_script_outside_of_srun_is_refused() -> None:
    with pytest.raises(UserError, match="outside of srun"):
        World(launcher="sbatch").join_process_group(torch.device("cpu"))


def test_cuda_ranks_connect_at_once_to_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of fewer ranks are then split from the same communicator."""
    calls = mock.Mock()
    monkeypatch.setattr(world_module, "join_rendezvous", calls.meet)
    monkeypatch.setattr(world_module, "StallWatch", calls.watch)
    monkeypatch.setattr(torch.cuda, "set_device", calls.set_device)
    monkeypatch.setattr(world_module, "read_device_uuid", calls.read_uuid)
    monkeypatch.setattr(dist, "init_process_group", calls.init)
    world, device = World(1, 2, 1, 2, "torchrun", "127.0.0.1", 9), torch.device("cuda", 1)
    try:
        world.join_process_group(device, timeout_minutes=3, stall_seconds=7, on_stall=print)
        assert calls.init.call_args.args == ("cpu:gloo,cuda:nccl",)
        given = calls.init.call_args.kwargs
        assert given["device_id"] == device and given["timeout"] == timedelta(minutes=3)
        background = calls.meet.return_value.background_store
        hosts = calls.meet.return_value.hosts
        calls.watch.assert_called_once_with(1, hosts, background, 7, print)
    finally:
        world.leave_process_group()
    calls.watch.return_value.close.assert_called_once_with()


def _die_or_explain(world: World) -> str | None:
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(RuntimeError) as caught:
        world.barrier()
    assert world.explain_failure(ValueError("else")) is None
    return world.explain_failure(caught.value)


@pytest.mark.dist
def test_dead_rank_is_named() -> None:
    with pytest.raises(AssertionError, match="rank 1 of 2:\nprocess died without a word") as caught:
        run_ranks(_die_or_explain, 2)
    assert "rank 0 of 2" not in str(caught.value)


@pytest.mark.dist
def test_all_alive_is_no_explanation() -> None:
    assert run_ranks(_accuse, 2) == [None, None]


def _accuse(world: World) -> str | None:
    explanation = world.explain_failure(RuntimeError("gloo: made up"))
    world.barrier()
    return explanation


def _sum_and_copy(world: World) -> tuple[list[int], list[float]]:
    total = torch.tensor([2**60 >> 2, world.rank])
    world.all_reduce_sum(total)
    copied = torch.tensor([float(world.rank), 0.5])
    world.broadcast_tensor(copied, 1)
    return total.tolist(), copied.tolist()


@pytest.mark.dist
def test_tensors_are_added_up_and_copied() -> None:
    assert run_ranks(_sum_and_copy, 3) == [([3 * 2**58, 3], [1.0, 0.5])] * 3
    alone = torch.tensor([7])
    World().all_reduce_sum(alone)
    World().broadcast_tensor(alone, 0)
    assert alone.tolist() == [7]


def _compare(world: World) -> list[list[int]]:
    world.check_agreement("inputs", {"a": [1, "b"]})
    with pytest.raises(
        UserError, match=r"do not have the same inputs: a is 0 on rank 0 .* and 1 on"
    ):
        world.check_agreement("inputs", {"a": min(world.rank, 1)})
    return world.gather_integers([world.rank, -(2**63)])


@pytest.mark.dist
def test_values_of_all_ranks_are_compared() -> None:
    assert run_ranks(_compare, 3) == [[[rank, -(2**63)] for rank in range(3)]] * 3
    World().check_agreement("inputs", {})
    assert World().gather_integers([5]) == [[5]]


def test_token_tells_runs_apart() -> None:
    token = World(job="SLURM step 1.0", command="train").build_run_token(torch.device("cpu"))
    assert (token["run"], token["command"], token["device"]) == ("SLURM step 1.0", "train", "cpu")
    # PyPI's wheels are of "2.11.0" where torch itself says "2.11.0+cu130"
    version = token["version of torch"].partition("+")[0]
    assert version == str(torch.__version__).partition("+")[0]
