"""Launcher environments, as the launchers set them, and agreement between real ranks."""

import pytest
import torch
import torch.distributed as dist

from dist_peft.core.errors import UserError
from dist_peft.core.world import RemoteError, World
from tests.dist import run_ranks

MEET = {"MASTER_ADDR": "node1", "MASTER_PORT": "1234"}


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        pytest.param({}, World(), id="python"),
        pytest.param(
            {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", **MEET},
            World(3, 4, 1, 2, "torchrun", "node1", 1234),
            id="torchrun",
        ),
        pytest.param(
            {"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}
            | {"SLURM_LOCALID": "0", "SLURM_NTASKS_PER_NODE": "1", **MEET},
            World(1, 2, 0, 1, "slurm", "node1", 1234),
            id="srun",
        ),
        pytest.param(
            {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_JOB_ID": "7"},
            World(),
            id="batch script without srun is one process, not rank 0 of 2",
        ),
        pytest.param(
            {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}
            | {"OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
            | {"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", **MEET},
            World(1, 2, 1, 2, "openmpi", "node1", 1234),
            id="mpirun inside sbatch: MPI's variables are right",
        ),
        pytest.param(
            {"PMI_RANK": "0", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2"}
            | MEET,
            World(0, 2, 0, 2, "pmi", "node1", 1234),
            id="mpich",
        ),
        pytest.param(
            {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
            | {"SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "9", **MEET},
            World(1, 2, 0, 1, "torchrun", "node1", 1234),
            id="torchrun under srun: torchrun's are right",
        ),
    ],
)
def test_reads_launcher(env: dict[str, str], expected: World) -> None:
    assert World.from_env(env) == expected


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"RANK": "0"}, "WORLD_SIZE is not set"),
        ({"WORLD_SIZE": "2"}, "RANK is not set"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK='x' is not a number"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 of WORLD_SIZE=2"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "MASTER_ADDR is not set"),
        ({"RANK": "0", "WORLD_SIZE": "2", **MEET}, "LOCAL_RANK is not set"),
    ],
)
def test_refuses_incomplete(env: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        World.from_env(env)


def test_device() -> None:
    assert World().device("cpu") == torch.device("cpu")
    if not torch.cuda.is_available():
        assert World().device("auto") == torch.device("cpu")
        with pytest.raises(UserError, match=r"train\.device is cuda"):
            World().device("cuda")


def _agree(world: World) -> None:
    assert world.any(world.rank == 1)
    assert not world.any(False)
    assert world.sum(1.0, world.rank) == [world.size, sum(range(world.size))]
    assert world.max(world.rank, -world.rank) == [world.size - 1, 0]
    world.barrier()
    with world.together("nothing wrong"):
        pass


def _phase(world: World, first: int, error: Exception) -> None:
    with world.together("work"):
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


@pytest.mark.dist
def test_ranks_agree() -> None:
    run_ranks(_agree, 3)


@pytest.mark.dist
def test_error_of_one_is_error_of_all() -> None:
    run_ranks(_users_error, 3)
    run_ranks(_failure, 3)


def test_one_process_raises_its_own() -> None:
    with pytest.raises(KeyError), World().together("alone"):
        raise KeyError("x")


def test_unreachable_master_is_named() -> None:
    world = World(1, 2, 1, 2, "torchrun", "127.0.0.1", 9)
    with pytest.raises(UserError, match=r"rank 1 of 2 could not meet the others at 127\.0\.0\.1:9"):
        world.connect(torch.device("cpu"), timeout_minutes=0.02)
