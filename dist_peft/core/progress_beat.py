"""The progress beat of this process: the phase of its main thread, and a count of work done.

``core.stall_watch`` looks at it from a thread and compares it with the beats of the other ranks. A
beat costs the main thread an increment; it is no thread, lock, file or message.

The longest time between two beats is ``engine.stall_seconds`` times the phase's patience: one piece
of work of a checkpoint or of GPTQ takes longer than one of a step. A phase that does many pieces
calls ``mark_progress`` after each, so that its patience is for one piece and not for all.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

__all__ = [
    "SETUP_PATIENCE",
    "BeatState",
    "connect_to_ranks",
    "enter_phase",
    "mark_progress",
    "read_beat",
    "reset_beat",
    "start_step_phase",
    "wait_for_ranks",
]

SETUP_PATIENCE = 6.0
"""Patience of whatever comes before the first step, and of the first step, which may compile."""


@dataclass(frozen=True, slots=True)
class BeatState:
    """The activity of the main thread.

    Attributes:
        turn: number of calls of ``start_step_phase``. All ranks make the same calls, so of two
            ranks that stand still the one with the smaller turn is behind.
        step: the step at work, from 1; 0 before the first.
        phase: a few words.
        patience: the longest time without progress in this phase, in ``engine.stall_seconds``.
        waits: whether it is in a collective that does nothing but wait for the other ranks.
        connects: whether it makes a process group: a rank that has died refuses no connection there
            and breaks none, so that the others would wait for it.
    """

    turn: int = 0
    step: int = 0
    phase: str = "start"
    patience: float = SETUP_PATIENCE
    waits: bool = False
    connects: bool = False

    def describe(self) -> str:
        """Return such as ``in 'checkpoint' of step 12``."""
        where = f"of step {self.step}" if self.step else "before the first step"
        waiting = ", waiting for the other ranks," if self.waits else ""
        return f"in {self.phase!r}{waiting} {where}"


class _Beat:
    """State and count of this process."""

    def __init__(self) -> None:
        self.state = BeatState()
        self.count = 0
        self.first_step: int | None = None


_beat = _Beat()


def reset_beat() -> None:
    """Begin again, as a process does."""
    global _beat
    _beat = _Beat()


def read_beat() -> tuple[BeatState, int]:
    """Return the state and the count of marks so far; progress changes one of them."""
    beat = _beat
    return beat.state, beat.count


def mark_progress() -> None:
    """Count one piece of work; may be called from any thread that works for the main thread."""
    _beat.count += 1


def start_step_phase(step: int, phase: str) -> None:
    """Begin a part of a training step; every rank calls it equally often.

    Args:
        step: from 1. The first one of a process has more patience than the following ones.
    """
    if not _is_main_thread():
        return
    beat = _beat
    if beat.first_step is None:
        beat.first_step = step
    patience = SETUP_PATIENCE if step == beat.first_step else 1.0
    beat.state = BeatState(beat.state.turn + 1, step, phase, patience)


@contextmanager
def enter_phase(phase: str, patience: float = 1.0) -> Iterator[None]:
    """Be in ``phase`` inside, and in the outer phase again afterwards.

    A thread behind the main thread, such as one that writes a checkpoint, changes nothing: its
    progress is not that of the run.

    Args:
        patience: of this phase, in ``engine.stall_seconds``; an inner phase has at least that of
            the outer one. ``math.inf`` for a call that has time limits of its own.
    """
    outer = _beat.state
    with _be_in_state(replace(outer, phase=phase, patience=max(patience, outer.patience))):
        yield


@contextmanager
def wait_for_ranks() -> Iterator[None]:
    """Wait for other ranks inside: this rank is not the one that they wait for."""
    with _be_in_state(replace(_beat.state, waits=True)):
        yield


@contextmanager
def connect_to_ranks() -> Iterator[None]:
    """Make process groups inside: a rank that falls silent meanwhile is named soon."""
    with _be_in_state(replace(_beat.state, waits=True, connects=True)):
        yield


@contextmanager
def _be_in_state(state: BeatState) -> Iterator[None]:
    if not _is_main_thread():
        yield
        return
    beat = _beat
    outer, beat.state = beat.state, state
    try:
        yield
    finally:
        beat.state = replace(outer, turn=beat.state.turn, step=beat.state.step)
        beat.count += 1


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
