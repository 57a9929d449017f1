"""Launcher environments, as the launchers set them: read, refused."""

import shutil
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_peft.core.errors import UserError
from dist_peft.core.launchers import (
    LaunchInfo,
    derive_job_port,
    detect_launch,
    expand_host_list,
    expand_task_counts,
)

MEET = {"MASTER_ADDR": "node1", "MASTER_PORT": "1234"}
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
TORCHRUN |= {"TORCHELASTIC_RUN_ID": "x", "GROUP_WORLD_SIZE": "2", **MEET}
DEEPSPEED = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}
DEEPSPEED |= {"CROSS_RANK": "1", "CROSS_SIZE": "2", **MEET}
STEP = {
    "SLURM_JOB_ID": "1234567",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_STEP_NODELIST": "n[08-10]",
    "SLURMD_NODENAME": "n09",
}
OPENMPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}
OPENMPI |= {"OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
DAEMON = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}
IN_STEP = LaunchInfo(3, 5, 1, 2, "slurm", "n08", 24567, host="n09", hosts=("n08", "n09", "n10"))


def without(env: dict[str, str], *names: str) -> dict[str, str]:
    return {k: v for k, v in env.items() if k not in names}


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        pytest.param({}, LaunchInfo(), id="python"),
        pytest.param(TORCHRUN, LaunchInfo(3, 4, 1, 2, "torchrun", "node1", 1234), id="torchrun"),
        pytest.param(
            TORCHRUN | {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "2"},
            LaunchInfo(3, 4, 1, 2, "torchrun", "node1", 1234, agent=2),
            id="torchrun: its agent serves the store",
        ),
        pytest.param(
            TORCHRUN | STEP | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"},
            LaunchInfo(3, 4, 1, 2, "torchrun", "node1", 1234),
            id="torchrun under srun: torchrun's are right",
        ),
        pytest.param(DEEPSPEED, LaunchInfo(3, 4, 1, 2, "deepspeed", "node1", 1234), id="deepspeed"),
        pytest.param(
            without(TORCHRUN, "TORCHELASTIC_RUN_ID", "GROUP_WORLD_SIZE"),
            LaunchInfo(3, 4, 1, 2, "environment", "node1", 1234),
            id="by hand",
        ),
        pytest.param(
            {"RANK": "0", "WORLD_SIZE": "1"},
            LaunchInfo(launcher="environment", port=29500),
            id="by hand, one process",
        ),
        pytest.param(STEP, IN_STEP, id="srun"),
        pytest.param(
            STEP | {"PMI_RANK": "3", "PMI_SIZE": "5"}, IN_STEP, id="srun with a PMI plug-in"
        ),
        pytest.param(
            STEP | {"MASTER_PORT": "7"},
            LaunchInfo(**{**vars(IN_STEP), "port": 7}),
            id="srun with MASTER_PORT",
        ),
        pytest.param(
            {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_JOB_ID": "7"},
            LaunchInfo(launcher="sbatch"),
            id="batch script without srun is not rank 0 of 2",
        ),
        pytest.param(
            {"SLURM_PROCID": "0", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_ID": "7"},
            LaunchInfo(),
            id="batch script of one task",
        ),
        pytest.param(DAEMON | {"SLURM_JOB_ID": "7"}, LaunchInfo(), id="srun -n 1"),
        pytest.param(
            OPENMPI | DAEMON | MEET,
            LaunchInfo(1, 2, 0, 1, "openmpi", "node1", 1234),
            id="mpirun inside sbatch: MPI's variables are right",
        ),
        pytest.param(OPENMPI, LaunchInfo(1, 2, 0, 1, "openmpi", None, 29500), id="open mpi"),
        pytest.param(MPICH, LaunchInfo(1, 2, 1, 2, "mpich", None, 29500), id="mpich"),
    ],
)
def test_reads_launcher(env: dict[str, str], expected: LaunchInfo) -> None:
    assert detect_launch(env) == expected


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"RANK": "0"}, "WORLD_SIZE is not set, although RANK is"),
        ({"WORLD_SIZE": "2"}, "RANK is not set, although WORLD_SIZE is"),
        (TORCHRUN | {"RANK": "x"}, "RANK='x' is not a number"),
        (TORCHRUN | {"RANK": "4"}, "RANK=4 of WORLD_SIZE=4"),
        (without(TORCHRUN, "MASTER_ADDR"), "MASTER_ADDR is not set"),
        (without(TORCHRUN, "LOCAL_RANK"), "LOCAL_RANK is not set"),
        (TORCHRUN | {"MASTER_PORT": "http"}, "MASTER_PORT='http' is not a number"),
        (TORCHRUN | {"MASTER_ADDR": "localhost"}, "MASTER_ADDR=localhost means this host"),
        (STEP | {"MASTER_ADDR": "127.0.0.1"}, "rank 3 of 5 is not on rank 0's host"),
        (
            {"RANK": "0", "WORLD_SIZE": "1", **STEP},
            "RANK=0 of WORLD_SIZE=1 contradicts slurm, which started this process as 3 of 5",
        ),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", **MEET, **MPICH}, "contradicts mpich"),
        (TORCHRUN | STEP | {"GROUP_WORLD_SIZE": "1"}, "slurm started 5 copies of torchrun"),
        (DEEPSPEED | STEP | {"CROSS_SIZE": "1"}, "slurm started 5 copies of deepspeed"),
        ({"PMIX_RANK": "1"}, "PMIX_RANK is set by an MPI launcher"),
        ({"PMI_RANK": "1"}, "PMI_RANK is set by an MPI launcher"),
        ({"PMI_SIZE": "2"}, "PMI_SIZE is set by an MPI launcher"),
        (TORCHRUN | {"MASTER_PORT": "0"}, "MASTER_PORT=0 is no port"),
        (MPICH | {"MASTER_PORT": "-1"}, "MASTER_PORT=-1 is no port"),
        (STEP | {"MASTER_PORT": "65536"}, "MASTER_PORT=65536 is no port"),
        (STEP | {"SLURM_STEP_NODELIST": "n[1-9999999999]"}, "too many; export MASTER_ADDR"),
        (STEP | {"SLURM_STEP_TASKS_PER_NODE": "2(x9999999999)"}, "cannot read SLURM_STEP_TASKS"),
        (without(STEP, "SLURM_STEP_NODELIST"), "SLURM_STEP_NODELIST is not set"),
        (STEP | {"SLURM_NODEID": "3"}, "SLURM_NODEID=3, but SLURM_STEP_TASKS_PER_NODE names 3"),
        (without(OPENMPI, "OMPI_COMM_WORLD_LOCAL_RANK"), "OMPI_COMM_WORLD_LOCAL_RANK is not set"),
    ],
)
def test_refuses(env: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        detect_launch(env)


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("node", ["node"]),
        ("n[08-10,12],login", ["n08", "n09", "n10", "n12", "login"]),
        ("a1,b[2-3]x,c", ["a1", "b2x", "b3x", "c"]),
        ("r[1-2]n[1-2]", ["r1n1", "r1n2", "r2n1", "r2n2"]),
        ("gpu-a-[99-101]", ["gpu-a-99", "gpu-a-100", "gpu-a-101"]),
    ],
)
def test_expands_hosts(text: str, hosts: list[str]) -> None:
    assert expand_host_list(text) == hosts
    if shutil.which("scontrol"):
        done = subprocess.run(
            ["scontrol", "show", "hostnames", text], capture_output=True, text=True, check=False
        )
        assert done.returncode != 0 or done.stdout.split() == hosts


@given(st.sets(st.integers(0, 120), min_size=1), st.integers(3, 5))
def test_expands_what_slurm_compresses(numbers: set[int], width: int) -> None:
    ranges: list[list[int]] = []
    for n in sorted(numbers):
        if ranges and ranges[-1][1] == n - 1:
            ranges[-1][1] = n
        else:
            ranges.append([n, n])
    parts = [f"{a:0{width}}" + (f"-{b:0{width}}" if b > a else "") for a, b in ranges]
    expected = [f"node{n:0{width}}" for n in sorted(numbers)]
    assert expand_host_list(f"node[{','.join(parts)}]") == expected


@pytest.mark.parametrize("text", ["", "n[1-", "n[a-b]", "n]"])
def test_bad_host_list_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="SLURM host list"):
        expand_host_list(text)


def test_expands_tasks() -> None:
    assert expand_task_counts("2(x3),1") == [2, 2, 2, 1]
    with pytest.raises(UserError, match="SLURM_STEP_TASKS_PER_NODE='2x3'"):
        expand_task_counts("2x3")


def test_port_of_a_job() -> None:
    assert derive_job_port(7) == 20007
    assert derive_job_port(30009) == 20009


@pytest.mark.parametrize(
    ("env", "job"),
    [
        ({}, ""),
        (TORCHRUN, "torchrun run x"),
        (TORCHRUN | {"TORCHELASTIC_RUN_ID": "none"}, ""),
        (TORCHRUN | STEP | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}, "torchrun run x"),
        (DEEPSPEED | {"SLURM_JOB_ID": "7"}, ""),
        (STEP, "SLURM step 1234567.0"),
        (STEP | {"SLURM_HET_JOB_ID": "1234566"}, "SLURM step 1234566.0"),
        (OPENMPI | {"PMIX_NAMESPACE": "prterun-node1-77@1"}, "Open MPI job prterun-node1-77@1"),
        (OPENMPI, ""),
        (MPICH, ""),
    ],
)
def test_job_is_what_every_rank_of_a_run_is_given(env: dict[str, str], job: str) -> None:
    assert detect_launch(env).job == job
