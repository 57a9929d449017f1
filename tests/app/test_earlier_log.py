"""The reason of a command that ended early is in the log of the run that it names, no other."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_peft.app.earlier_log import append_to_earlier_log, name_run_directory
from dist_peft.core.log import close_log, setup_log
from dist_peft.core.world import World
from dist_peft.train.run_lock import RunLock
from dist_peft.train.run_state import set_run_state


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[Path]:
    """An earlier run, noted."""
    (tmp_path / "run").mkdir()
    set_run_state(tmp_path / "run", "finished")
    (tmp_path / "run" / "log.txt").write_text("old\n")
    name_run_directory(tmp_path / "run", World())
    yield tmp_path / "run"
    name_run_directory(None, World())
    close_log()


def test_line_is_appended(run_dir: Path) -> None:
    before = {path.name for path in run_dir.iterdir()}
    append_to_earlier_log("data.train is empty")
    first, last = (run_dir / "log.txt").read_text().splitlines()
    assert first == "old" and last.endswith(" ERROR data.train is empty")
    assert {path.name for path in run_dir.iterdir()} == before


def test_other_directories_are_left_alone(run_dir: Path) -> None:
    lock = RunLock(run_dir)
    lock.acquire()
    append_to_earlier_log("of a second run")
    lock.release()
    name_run_directory(run_dir, World(rank=1, size=2))
    append_to_earlier_log("of another rank")
    name_run_directory(run_dir.parent / "new", World())
    append_to_earlier_log("of a new run")
    name_run_directory(run_dir, World())
    setup_log(run_dir.parent / "opened", 0, 1)
    append_to_earlier_log("of a run that has a log")
    close_log()
    os.mkfifo(run_dir / "run.lock")  # blocks whoever opens it
    append_to_earlier_log("next to a FIFO")
    (run_dir / "run.lock").unlink()
    (run_dir / "run_state.json").unlink()
    append_to_earlier_log("in a directory of something else")
    set_run_state(run_dir, "finished")
    (run_dir / "log.txt").rename(run_dir / "moved")
    append_to_earlier_log("without a log")
    (run_dir / "log.txt").symlink_to("moved")
    append_to_earlier_log("into a link")
    assert (run_dir / "moved").read_text() == "old\n"
    assert {path.name for path in run_dir.parent.iterdir()} == {"run", "opened"}
