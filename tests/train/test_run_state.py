"""``run_state.json``."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from dist_peft.core.errors import UserError
from dist_peft.train import run_state
from dist_peft.train.run_lock import LOCK_NAME, LockHolder
from dist_peft.train.run_state import STATE_NAME, note_step, read_run_state, set_run_state


def test_states_keep_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_run_state(tmp_path) is None
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
    assert [path.name for path in tmp_path.iterdir()] == [STATE_NAME]


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
