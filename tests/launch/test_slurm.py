"""The shipped job scripts under a real SLURM of two nodes."""

import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dist_peft.app import cli
from dist_peft.core.log import close_log
from tests.launch.conftest import TRAIN, SmallRun, submit_script
from tests.support.cluster import Slurm, wait_until
from tests.support.transcripts import TRANSCRIPTS, find_missing_line, read_commands

pytestmark = pytest.mark.launcher


@pytest.mark.parametrize(
    ("script", "tasks_per_node", "expected"),
    [
        ("fsdp2_nodes.sbatch", 2, "on 4 ranks (fsdp2)"),
        ("zero3_nodes.sbatch", 1, "on 2 ranks (zero)"),
    ],
)
def test_script_trains_as_one_process(
    slurm: Slurm,
    small_run: SmallRun,
    forked_python: str,
    script: str,
    tasks_per_node: int,
    expected: str,
) -> None:
    python = forked_python if tasks_per_node > 1 else sys.executable
    job, out = submit_script(slurm, small_run, script, tasks_per_node, python=python)
    assert slurm.wait(job) == "COMPLETED", out.read_text()
    assert expected in out.read_text()
    small_run.check()


def test_signal_requeues_and_resumes(slurm: Slurm, long_run: SmallRun, forked_python: str) -> None:
    """As one process, though stopped three times: while Python imports (the signal may reach one
    task only, and srun kill the other); as ``--signal=B:USR1@N`` does it (to the script); and as
    ``USR1@N`` (to its tasks)."""
    python = long_run.directory.parent / "python"
    python.write_text(
        f'#!/bin/sh\n[ "${{SLURM_RESTART_COUNT:-0}}" = 0 ] && exec {sys.executable} "$@"\n'
        f'exec {forked_python} "$@"\n'
    )
    python.chmod(0o755)
    job, out = submit_script(slurm, long_run, "fsdp2_nodes.sbatch", 1, python=str(python))
    for stop, to in enumerate(([], ["--batch"], []), 1):
        before = len(long_run.losses())
        if stop == 1:
            node = slurm.names[1]
            wait_until(lambda n=node: slurm.has_process(n, "launch/train.py"), 60, "a task")
        else:
            wait_until(lambda n=before: len(long_run.losses()) >= n + 3, 90, "three more steps")
        slurm.call("scancel", "--signal=USR1", *to, job)
        wait_until(lambda n=stop: out.read_text().count("requeueing") == n, 90, "requeue")
        wait_until(lambda: slurm.state(job) == "PENDING", 90, "job in the queue again")
        assert len(long_run.losses()) < len(long_run.expected)
        slurm.start_requeued(job)
    assert slurm.wait(job) == "COMPLETED", out.read_text()
    assert out.read_text().count(f"resumed {long_run.directory}/checkpoints") == 2
    assert "on 2 ranks (fsdp2)" in out.read_text()
    long_run.check()


def test_missing_rank_is_named(slurm: Slurm, small_run: SmallRun, forked_python: str) -> None:
    """The second task never starts the program: the first one waits its time and says so."""
    late = f"[ $SLURM_PROCID = 1 ] && sleep 60; exec {forked_python} {TRAIN} --config $0 $1"
    done = subprocess.run(
        slurm.command(
            slurm.names[0],
            *("srun", "-N2", "-n2", "--kill-on-bad-exit=1", "bash", "-c", late),
            *(str(small_run.config), "engine.start_timeout_minutes=0.03"),
        ),
        capture_output=True,
        text=True,
        env={"SLURM_CONF": str(slurm.directory / "slurm.conf"), "PATH": "/usr/bin:/bin"},
        timeout=60,
        check=False,
    )
    assert done.returncode != 0
    assert f"rank 1 of 2 did not come to {slurm.names[0]}:" in done.stderr
    assert f"no rank came from {slurm.names[1]}" in done.stderr


def test_batch_script_without_srun_is_refused(
    slurm: Slurm, small_run: SmallRun, forked_python: str
) -> None:
    out = small_run.directory.parent / "job.out"
    job = slurm.call(
        *("sbatch", "--parsable", "-N2", f"--output={out}"),
        f"--wrap={forked_python} {TRAIN} --config {small_run.config}",
    )
    assert slurm.wait(job.strip()) == "FAILED"
    assert "outside of srun" in out.read_text()


def add_clients(slurm: Slurm, directory: Path) -> str:
    """Write SLURM's clients as they are on a login node into ``directory``; gives the PATH."""
    directory.mkdir()
    for name in ("sinfo", "sbatch", "squeue", "scancel", "scontrol"):
        program = slurm.command(slurm.switch, str(shutil.which(name)))
        (directory / name).write_text(f'#!/bin/sh\nexec {shlex.join(program)} "$@"\n')
        (directory / name).chmod(0o755)
    return f"{directory}{os.pathsep}{os.environ['PATH']}"


@pytest.mark.data
def test_the_transcript_prints_its_lines(
    slurm: Slurm,
    shared_data: Path,
    tmp_path: Path,
    forked_python: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    settings = {
        "PATH": add_clients(slurm, tmp_path / "bin"),
        "SLURM_CONF": str(slurm.directory / "slurm.conf"),
        "PYTHON": forked_python,
        "DIST_PEFT_CACHE": str(tmp_path / "cache"),
        "NO_COLOR": "1",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    Path("base").symlink_to(shared_data / "stories260K-hf")
    records = (shared_data / "gsm8k" / "train.jsonl").read_text().splitlines(keepends=True)
    Path("questions.jsonl").write_text("".join(records[:100]))
    job, metrics = "", Path("runs/run/metrics.jsonl")

    def wait_before(program: str) -> None:
        """The page's commands are typed by a person who looks at the job first."""
        if program == "scancel":
            wait_until(lambda: metrics.is_file() and metrics.stat().st_size > 0, 120, "a step")
        elif program == "cat":
            wait_until(lambda: slurm.state(job) == "PENDING", 60, "job in the queue again")
            reason = ("squeue", "--noheader", f"--jobs={job}", "--format=%R")
            wait_until(lambda: "BeginTime" in slurm.call(*reason), 60, "the reason it waits for")
        elif program == "scontrol":
            time.sleep(2)  # slurmd refuses a job that comes back within the second of its end
        elif program == "grep" and job:
            assert slurm.wait(job, 400) == "COMPLETED", Path(f"slurm-{job}.out").read_text()

    verbs = []
    for shown in read_commands((TRANSCRIPTS / "slurm.md").read_text()):
        program, *words = shlex.split(shown.command.replace("17", job or "17"))
        wait_before(program)
        if program == "dist-peft":
            assert cli.main(words) == 0
            close_log()
            verbs.append(words[0])
        else:
            subprocess.run([program, *words], check=True)
        captured = capfd.readouterr()
        printed = captured.err if words[0] == "merge" else captured.out
        if program == "sbatch":
            job = printed.split()[-1]
        lines = printed.replace(slurm.names[0][:-1], "node").splitlines(keepends=True)
        printed = "".join(line for line in lines if not line.startswith("Bind /etc/netns/"))
        assert find_missing_line(shown, printed) is None, printed
    assert verbs == ["init", "inspect", "report", "merge"]
