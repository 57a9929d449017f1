"""torchrun on one host, and one agent on each of two hosts."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.conftest import TRAIN, SmallRun
from tests.support.cluster import Hosts, need, wait_until
from tests.support.dist import free_port

pytestmark = pytest.mark.launcher

TORCHRUN = (sys.executable, "-m", "torch.distributed.run")


def test_one_host(small_run: SmallRun) -> None:
    options = ["--nproc-per-node=2", f"--master-port={free_port()}"]
    command = [*TORCHRUN, *options, TRAIN, "--config", str(small_run.config)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    small_run.check()


@pytest.mark.parametrize("way", ["c10d", "static"])
def test_two_hosts(small_run: SmallRun, tmp_path: Path, forked_python: str, way: str) -> None:
    need("ip")
    with Hosts(tmp_path) as hosts:
        # by name: with a number torchrun asks whether its own name resolves to it, here 127.0.1.1
        first = hosts.names[0]
        agents = []
        for i, name in enumerate(hosts.names):
            meet = {
                "c10d": ("--rdzv-backend=c10d", f"--rdzv-endpoint={first}:29400", "--rdzv-id=1"),
                "static": (f"--master-addr={first}", "--master-port=29400", f"--node-rank={i}"),
            }[way]
            command = (*TORCHRUN, "--nnodes=2", "--nproc-per-node=1", *meet, TRAIN)
            log = tmp_path / f"{name}.log"
            command = (*command, "--config", str(small_run.config))
            env = {"PYTHON_EXEC": forked_python}
            agents.append((hosts.popen(name, *command, log=log, env=env), log))
        for agent, log in agents:
            assert agent.wait(timeout=120) == 0, log.read_text()
    small_run.check()


@pytest.mark.parametrize("dies", [1, 0], ids=["another rank", "the rank that serves the store"])
def test_rank_that_dies_is_named(
    long_run: SmallRun, tmp_path: Path, forked_python: str, dies: int
) -> None:
    """Two hosts by hand, no launcher to help: one host goes away in the middle."""
    need("ip")
    with Hosts(tmp_path) as hosts:
        env = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": hosts.names[0]}
        command = (forked_python, TRAIN, "--config", str(long_run.config), "train.steps=100000")
        logs = [tmp_path / f"rank{i}.log" for i in range(2)]
        ranks = [
            hosts.popen(name, *command, log=logs[i], env={**env, "RANK": str(i)})
            for i, name in enumerate(hosts.names)
        ]
        wait_until(lambda: len(long_run.losses()) >= 2, 90, "two steps")
        hosts.kill(hosts.names[dies])
        lives = 1 - dies
        assert ranks[lives].wait(timeout=60) == 1, logs[lives].read_text()
        named = f"no sign of life from rank {dies} on {hosts.names[dies]}"
        assert named in logs[lives].read_text()


def test_wrong_address_ends_in_time(
    small_run: SmallRun, tmp_path: Path, forked_python: str
) -> None:
    """Two hosts by hand: the one with a wrong address and rank 0 both end, and say who lacks."""
    need("ip")
    with Hosts(tmp_path) as hosts:
        ranks = []
        for i, name in enumerate(hosts.names):
            env = {"RANK": str(i), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_PORT": "29400"}
            env["MASTER_ADDR"] = hosts.names[0] if i == 0 else f"{hosts.names[0]}x"
            command = (forked_python, TRAIN, "--config", str(small_run.config))
            log = tmp_path / f"rank{i}.log"
            short = "engine.start_timeout_minutes=0.1"
            ranks.append((hosts.popen(name, *command, short, log=log, env=env), log))
        texts = [(rank.wait(timeout=60), log.read_text()) for rank, log in ranks]
        assert [code for code, _ in texts] == [2, 2], texts
        assert f"rank 1 of 2 did not come to {hosts.names[0]}:29400 within 6 s" in texts[0][1]
        wrong = f"rank 1 on {hosts.names[1]} could not reach rank 0 at {hosts.names[0]}x:29400"
        assert wrong in texts[1][1]
        assert "Traceback" not in texts[0][1] + texts[1][1]
