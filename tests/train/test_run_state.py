"""``run_state.json``."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from dist_peft.core.errors import UserError
from dist_peft.train import run_state
from dist_peft.train.run_lock import LOCK_NAME, LockHolder
from dist_peft.train.run_state import STATE_NAME, note_step, read_run_state, set_run_state
from tests.support.small_disk import fill_disk


def _hold_lock(run_dir: Path) -> None:
    holder = LockHolder.describe_this_process("")
    (run_dir / LOCK_NAME).write_text(json.dumps(asdict(holder)))


def test_states_keep_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_run_state(tmp_path) is None
    _hold_lock(tmp_path)
    set_run_state(tmp_path, "running")
    note_step(3)
    found = read_run_state(tmp_path)
    assert found is not None and (found.state, found.step, found.reason) == ("running", 0, "")
    monkeypatch.setattr(run_state, "_NOTE_SECONDS", -1.0)
    note_step(4)
    found = read_run_state(tmp_path)
    assert found is not None and found.step == 4 and found.time.endswith("+00:00")
    set_run_state(tmp_path, "stopped", "a signal")
    monkeypatch.setattr(run_state, "_current", None)  # the next process
    set_run_state(tmp_path, "running")
    found = read_run_state(tmp_path)
    assert found is not None and (found.state, found.step) == ("running", 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == [LOCK_NAME, STATE_NAME]


def test_a_killed_run_is_told_from_a_running_one(tmp_path: Path) -> None:
    set_run_state(tmp_path, "running")
    holder = LockHolder.describe_this_process("")
    for started, state in ((holder.started, "running"), (1.0, "failed")):
        text = json.dumps(asdict(replace(holder, started=started)))
        (tmp_path / LOCK_NAME).write_text(text)
        found = read_run_state(tmp_path)
        assert found is not None and found.state == state
    assert found.reason == f"process {holder.pid} on {holder.host} was killed"


def test_a_directory_that_is_gone_is_no_error(tmp_path: Path) -> None:
    set_run_state(tmp_path / "gone", "failed", "disk")
    assert not (tmp_path / "gone").exists()
    (tmp_path / STATE_NAME).write_text("{}")
    with pytest.raises(UserError, match=r"run_state\.json is damaged"):
        read_run_state(tmp_path)


def test_the_last_state_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread ends the process while the main thread notices it, too."""
    monkeypatch.setattr(run_state, "_is_sealed", False)
    set_run_state(tmp_path, "failed", "rank 1 has stood still", is_last=True)
    set_run_state(tmp_path, "failed", "gloo: connection closed")
    state = read_run_state(tmp_path)
    assert state is not None and state.reason == "rank 1 has stood still"


@pytest.mark.parametrize("reason", ["short", "long " * 100])
def test_the_end_is_recorded_on_a_full_disk(small_disk: Path, reason: str) -> None:
    set_run_state(small_disk, "running")
    note_step(5)
    fill_disk(small_disk)
    set_run_state(small_disk, "refused", reason)
    found = read_run_state(small_disk)
    assert found is not None
    assert (found.state, found.step, found.reason) == ("refused", 5, reason)
    assert not list(small_disk.glob("*.tmp"))
    set_run_state(small_disk, "failed", "x")
    found = read_run_state(small_disk)
    assert found is not None and found.reason == "x"


def test_a_run_that_recorded_no_end_is_not_running(tmp_path: Path) -> None:
    _hold_lock(tmp_path)
    set_run_state(tmp_path, "running")
    (tmp_path / LOCK_NAME).unlink()
    found = read_run_state(tmp_path)
    assert found is not None and found.state == "failed" and "could not write" in found.reason
