"""mpirun of MPICH and of Open MPI; nobody exports MASTER_ADDR."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.conftest import ROOT, SmallRun
from tests.support.cluster import Hosts, need

pytestmark = pytest.mark.launcher

SCRIPT = str(ROOT / "launch" / "mpi" / "train.sh")
PYTHON = Path(sys.executable).parent


def mpich() -> str:
    """The mpirun of the mpich wheel, beside the interpreter."""
    found = shutil.which("mpirun", path=str(PYTHON))
    if found is None:
        need("mpirun of pip's mpich", root=False)
    return str(found)


def openmpi() -> str:
    need("mpirun.openmpi", root=False)
    return str(shutil.which("mpirun.openmpi"))


def run_script(mpirun: str, run: SmallRun, *overrides: str, **env: str) -> str:
    done = subprocess.run(
        ["bash", SCRIPT, str(run.config), *overrides],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHON": sys.executable, "MPIRUN": mpirun, "RANKS": "2", **env},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stderr + done.stdout


def test_mpich(small_run: SmallRun) -> None:
    assert "on 2 ranks (fsdp2)" in run_script(mpich(), small_run)
    small_run.check()


def test_openmpi_on_two_hosts(small_run: SmallRun, tmp_path: Path) -> None:
    mpirun = openmpi()
    need("ip", "sshd", "ssh", "ssh-keygen")
    with Hosts(tmp_path) as hosts:
        bin_directory = hosts.start_sshd()
        hostfile = tmp_path / "hostfile"
        hostfile.write_text("".join(f"{name} slots=1\n" for name in hosts.names))
        done = subprocess.run(
            hosts.command(hosts.names[0], "bash", SCRIPT, str(small_run.config)),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            env={
                **os.environ,
                "PYTHON": sys.executable,
                "MPIRUN": mpirun,
                "RANKS": "2",
                "HOSTFILE": str(hostfile),
                "MPIRUN_OPTIONS": "--mca oob_tcp_if_include eth0 --mca btl_tcp_if_include eth0",
                "OMPI_ALLOW_RUN_AS_ROOT": "1",
                "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
                "PATH": f"{bin_directory}:{os.environ['PATH']}",
            },
        )
    assert done.returncode == 0, done.stdout + done.stderr
    small_run.check()


def test_another_mpi_is_refused(small_run: SmallRun) -> None:
    """mpi4py on MPICH under Open MPI's variables would be two runs of one process each."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PMI", "MPI"))}
    for name, value in (("RANK", 1), ("SIZE", 2), ("LOCAL_RANK", 1), ("LOCAL_SIZE", 2)):
        env[f"OMPI_COMM_WORLD_{name}"] = str(value)
    code = (
        "from dist_peft.core.mpi import exchange_master_address; "
        "from dist_peft.core.launchers import detect_launch; "
        "exchange_master_address(detect_launch())"
    )
    mpich()
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**env, "MPI4PY_LIBMPI": f"{sys.prefix}/lib/libmpi.so.12"},
        check=False,
    )
    assert "rank 1 of 2, but mpi4py (MPICH" in done.stderr
