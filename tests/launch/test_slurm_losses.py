"""What a SLURM job survives: too short a limit of time, a requeue, a lost node, a killed rank.

Minutes of waiting for SLURM's daemons: by command only,

    DIST_PEFT_SLURM_LOSSES=1 pytest tests/launch/test_slurm_losses.py -s

Each job of two nodes ends with the losses of one process that was not disturbed.
"""

import os
import re
import signal
import time
from pathlib import Path

import pytest

from dist_peft.train.run_state import read_run_state
from tests.launch.conftest import SmallRun, submit_script
from tests.support.cluster import Slurm, wait_until

pytestmark = [
    pytest.mark.launcher,
    pytest.mark.skipif(
        not os.environ.get("DIST_PEFT_SLURM_LOSSES"), reason="DIST_PEFT_SLURM_LOSSES is not set"
    ),
]

SAVING = ("save.every=5",)


def start(slurm: Slurm, run: SmallRun, *options: str) -> tuple[str, Path]:
    return submit_script(slurm, run, "fsdp2_nodes.sbatch", 1, options=options, overrides=SAVING)


def train_some_steps(run: SmallRun, steps: int = 8) -> int:
    """Wait until some steps are done; gives how many."""
    wait_until(lambda: len(run.losses()) >= steps, 120, f"{steps} steps")
    return len(run.losses())


def wait_in_queue(slurm: Slurm, job: str) -> float:
    """Wait until a job is back in the queue; gives the seconds."""
    began = time.monotonic()
    wait_until(lambda: slurm.state(job) == "PENDING", 60, "job in the queue again")
    return time.monotonic() - began


def list_checkpoints(run: SmallRun) -> list[str]:
    return sorted(p.name for p in (run.directory / "checkpoints").glob("step-*"))


def complete(slurm: Slurm, run: SmallRun, job: str, out: Path) -> None:
    assert slurm.wait(job, 300) == "COMPLETED", out.read_text()
    run.check()
    print(f"COMPLETED, {len(run.losses())} steps with the losses of one process")


def find_resumed_step(out: Path) -> int:
    """The step of the checkpoint that the job resumed last."""
    found = re.findall(r"resumed \S+/step-(\d+)", out.read_text())
    assert found, out.read_text()
    return int(found[-1])


def test_a_time_limit_below_the_start(slurm: Slurm, long_run: SmallRun) -> None:
    """Its signal comes while the tasks start: the job is requeued with nothing done, again and
    again, until its limit is raised."""
    job, out = start(slurm, long_run, "--time=1")
    for restart in (1, 2):
        wait_until(
            lambda n=restart: out.exists() and out.read_text().count("requeueing") == n,
            120,
            "requeue",
        )
        seconds = wait_in_queue(slurm, job)
        print(f"requeue {restart}: {len(long_run.losses())} steps, PENDING after {seconds:.1f} s")
        assert not long_run.losses()
        if restart == 2:
            slurm.call("scontrol", "update", f"job={job}", "TimeLimit=60")
        slurm.start_requeued(job)
    complete(slurm, long_run, job, out)


def test_requeue_by_command(slurm: Slurm, long_run: SmallRun) -> None:
    job, out = start(slurm, long_run)
    done = train_some_steps(long_run)
    slurm.call("scontrol", "requeue", job)
    seconds = wait_in_queue(slurm, job)
    print(f"requeued at step {done}, PENDING after {seconds:.1f} s, {list_checkpoints(long_run)}")
    slurm.start_requeued(job)
    complete(slurm, long_run, job, out)
    print(f"resumed step {find_resumed_step(out)}")
    assert find_resumed_step(out) >= 5


def test_a_node_that_is_set_down(slurm: Slurm, long_run: SmallRun) -> None:
    job, out = start(slurm, long_run)
    done, node = train_some_steps(long_run), slurm.names[1]
    slurm.call("scontrol", "update", f"nodename={node}", "state=down", "reason=trial")
    seconds = wait_in_queue(slurm, job)
    print(f"node down at step {done}, PENDING after {seconds:.1f} s, {list_checkpoints(long_run)}")
    time.sleep(4)  # the tasks on the node that is down are ended later
    # it may be back already (ReturnToService): SLURM then refuses the words
    slurm.call("scontrol", "update", f"nodename={node}", "state=resume", check=False)
    slurm.start_requeued(job)
    complete(slurm, long_run, job, out)
    print(f"resumed step {find_resumed_step(out)}")
    assert find_resumed_step(out) >= 5


def test_the_first_nodes_process_is_killed(slurm: Slurm, long_run: SmallRun) -> None:
    """The job fails, as it should: the other rank names the one that is gone, and the same command
    resumes."""
    job, out = start(slurm, long_run)
    done = train_some_steps(long_run)
    (process,) = slurm.find_processes(slurm.names[0], "launch/train.py", "python")
    began = time.monotonic()
    os.kill(process, signal.SIGKILL)
    assert slurm.wait(job) == "FAILED"
    print(f"killed at step {done}, FAILED after {time.monotonic() - began:.1f} s")
    lines = [line for line in out.read_text().splitlines() if line.startswith("dist-peft: ")]
    assert len(lines) == 1, out.read_text()
    print(lines[0])
    assert f"rank 1 on {slurm.names[1]} lost its peers: no sign of life from rank 0" in lines[0]
    reason = lines[0].removeprefix("dist-peft: ")
    assert (long_run.directory / "log.txt").read_text().rstrip().endswith(reason)
    state = read_run_state(long_run.directory)
    assert state is not None and (state.state, state.reason) == ("failed", reason)
    job, out = start(slurm, long_run)
    complete(slurm, long_run, job, out)
    print(f"resumed step {find_resumed_step(out)}")
