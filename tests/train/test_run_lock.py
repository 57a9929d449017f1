"""Who may use a run directory."""

import json
import os
import subprocess
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from dist_peft.core.errors import UserError
from dist_peft.train import run_lock
from dist_peft.train.run_lock import LOCK_NAME, LockHolder, RunLock, raise_if_taken_over


def write_holder(run_dir: Path, age: float = 0.0, **changes: Any) -> LockHolder:
    holder = replace(LockHolder.describe_this_process("job 1"), **changes)
    file = run_dir / LOCK_NAME
    file.write_text(json.dumps(asdict(holder)))
    now = time.time() - age
    os.utime(file, (now, now))
    return holder


def can_take(run_dir: Path, job: str = "") -> bool:
    """Whether a run may start; both ways of asking agree, and a refusal changes nothing."""
    lock, before = RunLock(run_dir, job), sorted(run_dir.iterdir())
    text = (run_dir / LOCK_NAME).read_text() if (run_dir / LOCK_NAME).exists() else ""
    refused = None
    try:
        lock.check_free()
    except UserError as error:
        refused = str(error)
    if refused is not None:
        with pytest.raises(UserError, match="belongs to another run"):
            lock.acquire()
        assert sorted(run_dir.iterdir()) == before
        assert (run_dir / LOCK_NAME).read_text() == text
        return False
    lock.acquire()
    assert LockHolder.read_from(run_dir / LOCK_NAME) == lock.holder
    lock.release()
    assert not list(run_dir.iterdir())
    return True


def test_one_run_at_a_time(tmp_path: Path) -> None:
    first = RunLock(tmp_path, "job 1")
    first.acquire()
    assert not can_take(tmp_path)
    assert not can_take(tmp_path, "job 1")  # a living process of the same job
    first.release()
    first.release()
    assert can_take(tmp_path)


def test_a_dead_process_of_this_machine_is_followed_at_once(tmp_path: Path) -> None:
    child = subprocess.Popen(["true"])
    child.wait()
    write_holder(tmp_path, pid=child.pid)
    assert can_take(tmp_path)
    write_holder(tmp_path, started=1.0)  # the pid was given to another process
    assert can_take(tmp_path)


@pytest.mark.parametrize(
    ("age", "job", "free"),
    [(5, "", False), (5, "job 2", False), (5, "job 1", True), (61, "", True), (55, "", False)],
)
def test_a_run_of_another_machine(tmp_path: Path, age: float, job: str, free: bool) -> None:
    write_holder(tmp_path, age, host="node7", machine="node7 x", pid=1)
    assert can_take(tmp_path, job) == free


def test_a_lock_without_a_name_is_that_of_a_starting_run(tmp_path: Path) -> None:
    for text in ("", "[]", '{"pid": 1}'):
        (tmp_path / LOCK_NAME).write_text(text)
        assert not can_take(tmp_path)
    os.utime(tmp_path / LOCK_NAME, (1, 1))
    assert can_take(tmp_path)


def test_heartbeat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "BEAT_SECONDS", 0.01)
    lock = RunLock(tmp_path)
    lock.acquire()
    os.utime(tmp_path / LOCK_NAME, (1, 1))
    end = time.monotonic() + 20
    while (tmp_path / LOCK_NAME).stat().st_mtime == 1 and time.monotonic() < end:
        time.sleep(0.01)
    assert time.time() - (tmp_path / LOCK_NAME).stat().st_mtime < 20
    (tmp_path / LOCK_NAME).unlink()  # by hand
    while not (tmp_path / LOCK_NAME).exists() and time.monotonic() < end:
        time.sleep(0.01)
    raise_if_taken_over()
    other = write_holder(tmp_path, token="other")
    while lock.taken_over_by is None and time.monotonic() < end:
        time.sleep(0.01)
    with pytest.raises(UserError, match="was taken over by process"):
        raise_if_taken_over()
    lock.release()
    assert LockHolder.read_from(tmp_path / LOCK_NAME) == other  # it is not this run's any more
    raise_if_taken_over()


def test_two_at_a_stale_lock(tmp_path: Path) -> None:
    write_holder(tmp_path, started=1.0)
    mark = tmp_path / f".{LOCK_NAME}.takeover"
    mark.touch()
    with pytest.raises(UserError, match="is taking over"):
        RunLock(tmp_path).acquire()
    os.utime(mark, (1, 1))  # of a process that was killed there
    assert can_take(tmp_path)
