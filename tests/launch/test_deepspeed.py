"""The deepspeed launcher: one host; two hosts over ssh (pdsh), Open MPI and SLURM."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.conftest import TRAIN, SmallRun
from tests.support.cluster import Hosts, Slurm, need
from tests.support.dist import free_port

pytestmark = pytest.mark.launcher

DEEPSPEED = (sys.executable, "-m", "deepspeed.launcher.runner")


def write_hostfile(path: Path, hosts: Hosts) -> str:
    path.write_text("".join(f"{name} slots=1\n" for name in hosts.names))
    return str(path)


def run(command: list[str], cwd: Path, **env: str) -> None:
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
        cwd=cwd,
        env={**os.environ, **env},
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_one_host(small_run: SmallRun, tmp_path: Path) -> None:
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("localhost slots=2\n")
    where = [f"--hostfile={hostfile}", "--no_ssh_check", "--master_addr=127.0.0.1"]
    where += [f"--master_port={free_port()}"]
    run([*DEEPSPEED, *where, TRAIN, "--config", str(small_run.config)], tmp_path)
    small_run.check()


@pytest.mark.parametrize("launcher", ["pdsh", "openmpi"])
def test_two_hosts_over_ssh(
    small_run: SmallRun, tmp_path: Path, forked_python: str, launcher: str
) -> None:
    need("ip", "sshd", "ssh", "ssh-keygen", "pdsh" if launcher == "pdsh" else "mpirun.openmpi")
    with Hosts(tmp_path) as hosts:
        programs = hosts.start_sshd()
        if launcher == "openmpi":  # not another MPI's mpirun, which may come first in PATH
            (programs / "mpirun").symlink_to("/usr/bin/mpirun.openmpi")
        options = [f"--hostfile={write_hostfile(tmp_path / 'hostfile', hosts)}"]
        options += [f"--launcher={launcher}", f"--master_addr={hosts.names[0]}"]
        if launcher == "openmpi":
            options.append(
                "--launcher_args=--mca oob_tcp_if_include eth0 --mca btl_tcp_if_include eth0"
            )
        script = ["--no_python", forked_python, TRAIN]
        command = [*DEEPSPEED, *options, *script, "--config", str(small_run.config)]
        if launcher == "openmpi":  # nothing in its environment tells deepspeed from mpirun
            command += ["engine.kind=zero", "engine.stage=2"]
        run(
            hosts.command(hosts.names[0], *command),
            tmp_path,
            PATH=f"{programs}:{os.environ['PATH']}",
            OMPI_ALLOW_RUN_AS_ROOT="1",
            OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1",
        )
    small_run.check()


def test_slurm(slurm: Slurm, small_run: SmallRun, tmp_path: Path) -> None:
    options = [f"--hostfile={write_hostfile(tmp_path / 'hostfile', slurm)}"]
    options += ["--launcher=slurm", "--no_ssh_check", f"--master_addr={slurm.names[0]}"]
    options += ["--launcher_args=-N2 --mpi=none"]
    command = [*DEEPSPEED, *options, TRAIN, "--config", str(small_run.config), "engine.kind=zero"]
    run(
        slurm.command(slurm.switch, *command),
        tmp_path,
        SLURM_CONF=str(slurm.directory / "slurm.conf"),
    )
    small_run.check()
