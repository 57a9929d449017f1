"""What a main thread does, and that it gets on."""

import math
import threading
from collections.abc import Iterator

import pytest

from dist_peft.core import progress_beat as beat
from dist_peft.core.progress_beat import BeatState, read_beat


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    beat.reset_beat()
    yield
    beat.reset_beat()


def test_phases_nest_and_keep_the_patience_of_the_outer_one() -> None:
    assert read_beat()[0].patience == beat.SETUP_PATIENCE
    for step in (4, 5):  # the first step of a process may compile
        beat.start_step_phase(step, "update")
    outer = read_beat()[0]
    assert outer == BeatState(2, 5, "update", 1.0) and outer.describe() == "in 'update' of step 5"
    with beat.enter_phase("download", math.inf), beat.enter_phase("hash", 2.0):
        assert read_beat()[0] == BeatState(2, 5, "hash", math.inf)
        with beat.wait_for_ranks():
            assert "waiting for the other ranks, of step 5" in read_beat()[0].describe()
    assert read_beat()[0] == outer


def test_an_error_leaves_the_phase() -> None:
    with pytest.raises(ZeroDivisionError), beat.enter_phase("load"):
        raise ZeroDivisionError
    assert read_beat()[0] == BeatState()


def test_every_change_is_progress() -> None:
    seen = [read_beat()]
    beat.mark_progress()
    seen.append(read_beat())
    with beat.wait_for_ranks():
        seen.append(read_beat())
    seen.append(read_beat())
    assert len(set(seen)) == 4


def test_a_step_that_begins_inside_of_a_phase_goes_on_after_it() -> None:
    with beat.enter_phase("task", 3.0):
        beat.start_step_phase(1, "read data")
    assert read_beat()[0] == BeatState(1, 1, "start")


def test_another_thread_changes_no_phase() -> None:
    found = []

    def write() -> None:
        with beat.enter_phase("checkpoint"), beat.wait_for_ranks():
            beat.start_step_phase(9, "update")
            found.append(read_beat())

    thread = threading.Thread(target=write)
    thread.start()
    thread.join()
    assert found == [(BeatState(), 0)] == [read_beat()]
