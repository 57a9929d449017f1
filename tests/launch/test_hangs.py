"""A link between two hosts that drops everything and closes no connection."""

import subprocess
import time
from pathlib import Path

import pytest

from tests.launch.conftest import TRAIN, losses, small_tree
from tests.support.cluster import Hosts, need, wait_until
from tests.support.tiny_runs import save_config

pytestmark = pytest.mark.launcher


def test_both_sides_of_a_cut_link_name_the_other(tmp_path: Path, forked_python: str) -> None:
    need("ip")
    config, run_dir = save_config(tmp_path, small_tree(tmp_path, 100000)), tmp_path / "run"
    with Hosts(tmp_path) as hosts:
        env = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": hosts.names[0]}
        command = (forked_python, TRAIN, "--config", str(config), "engine.stall_seconds=4")
        logs = [tmp_path / f"rank{i}.log" for i in range(2)]
        ranks = [
            hosts.popen(name, *command, log=logs[i], env={**env, "RANK": str(i)})
            for i, name in enumerate(hosts.names)
        ]
        wait_until(lambda: len(losses(run_dir)) >= 2, 90, "two steps")
        cut = ["ip", "-n", hosts.switch, "link", "set", "port2", "nomaster"]
        subprocess.run(cut, check=True)
        end = time.monotonic() + 4 + 15  # engine.stall_seconds, and the time to end after it
        for i, rank in enumerate(ranks):
            assert rank.wait(timeout=end - time.monotonic()) == 1, logs[i].read_text()
            last = logs[i].read_text().rstrip("\n").rpartition("\n")[2]
            other = f"rank {1 - i} on {hosts.names[1 - i]}"
            assert last.startswith(f"dist-peft: rank {i} on {hosts.names[i]} stops: {other}"), last
            assert "has given no sign of life for " in last
        assert "stops: rank 1 on" in (run_dir / "log.txt").read_text()
