"""``run_state.json`` of a run directory: whether the run is at work, or how and why it ended.

``running``, ``finished``, ``stopped`` (by a signal; can be resumed), ``refused`` (an error of the
configuration or input) or ``failed``. A process that was killed writes nothing: its state stays
``running``, and its lock (``train.run_lock``) is stale.
"""

import errno
import json
import os
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from dist_peft.core.errors import UserError
from dist_peft.core.redaction import redact_text
from dist_peft.train.run_lock import LOCK_NAME, LockHolder

__all__ = [
    "STATE_NAME",
    "RunState",
    "StateName",
    "note_step",
    "read_ended_state",
    "read_run_state",
    "restore_state_file",
    "set_run_state",
]

STATE_NAME = "run_state.json"

StateName = Literal["running", "finished", "refused", "failed", "stopped"]

_NOTE_SECONDS = 10.0
"""The shortest time between two writes because of a step."""


@dataclass(frozen=True)
class RunState:
    """State of a run.

    Attributes:
        state: see the module.
        step: optimizer steps done.
        reason: one line; empty while it runs.
        time: of this record, ISO 8601 in UTC.
    """

    state: StateName
    step: int
    reason: str
    time: str


@dataclass
class _Current:
    """The run of this process."""

    run_dir: Path
    state: RunState
    written: float
    first: int
    """Steps done before."""


_current: _Current | None = None
_is_sealed = False
_noted_step = 0
"""Of ``note_step``, also on ranks that write no state unless the first rank is killed."""


def set_run_state(
    run_dir: Path, state: StateName, reason: str = "", *, is_last: bool = False
) -> None:
    """Write the state of the run in ``run_dir``, from one rank, with the step noted last.

    A run directory that cannot be written any more is no error: this is called when a run ends.

    Args:
        is_last: the process is about to be ended from a thread: calls of the main thread change
            nothing any more.
    """
    global _current, _noted_step, _is_sealed
    if _is_sealed:
        return
    _is_sealed = is_last
    if _current is None or _current.run_dir != run_dir or state == "running":
        first = _read_step(run_dir)
        if state == "running":
            _noted_step = 0  # of an earlier run of this process
        step = max(first, _noted_step)
        _current = _Current(run_dir, RunState(state, step, reason, ""), 0.0, first)
    _current.state = replace(_current.state, state=state, reason=redact_text(reason))
    _write(_current)


def note_step(step: int) -> None:
    """Note the steps done by the run of this process; written every few seconds at most."""
    global _noted_step
    _noted_step = step
    if _current is None:
        return
    _current.state = replace(_current.state, step=step)
    if time.monotonic() - _current.written > _NOTE_SECONDS:
        _write(_current)


def read_ended_state(run_dir: Path) -> bytes | None:
    """Return the contents of ``run_state.json`` of a run that has ended; else None.

    A run that was killed says ``running`` and is known to have ended by its stale lock only, which
    the next run takes over: that state would be wrong afterwards.
    """
    try:
        contents = (run_dir / STATE_NAME).read_bytes()
        return None if json.loads(contents)["state"] == "running" else contents
    except (OSError, ValueError, LookupError, TypeError):
        return None


def restore_state_file(run_dir: Path, before: bytes) -> bool:
    """Write back what ``read_ended_state`` returned, unless this process has done steps since.

    Returns:
        Whether it was restored.
    """
    if _current is None or _current.run_dir != run_dir or _current.state.step != _current.first:
        return False
    _replace_file(run_dir, before)
    return True


def _write(current: _Current) -> None:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    current.state = replace(current.state, time=now)
    current.written = time.monotonic()
    _replace_file(current.run_dir, f"{json.dumps(asdict(current.state), indent=1)}\n".encode())


def _replace_file(run_dir: Path, contents: bytes) -> None:
    file, temporary = run_dir / STATE_NAME, run_dir / f".{STATE_NAME}.{os.getpid()}.tmp"
    with suppress(OSError):
        try:
            temporary.write_bytes(contents)
            os.replace(temporary, file)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            _overwrite_file(file, contents)
        finally:
            temporary.unlink(missing_ok=True)


def _overwrite_file(file: Path, contents: bytes) -> None:
    """Write over an existing file in place: on a full disk its own block is still there."""
    descriptor = os.open(file, os.O_WRONLY)
    try:
        old = os.fstat(descriptor).st_size
        # never shorter on the way: a reader must not see the end of the old contents after ours
        os.pwrite(descriptor, contents.ljust(old), 0)
        os.ftruncate(descriptor, len(contents))
    finally:
        os.close(descriptor)


def _read_step(run_dir: Path) -> int:
    with suppress(UserError):
        found = read_run_state(run_dir)
        return 0 if found is None else found.step
    return 0


def read_run_state(run_dir: Path) -> RunState | None:
    """Return the state of a run; None if it was never written.

    ``running`` becomes ``failed`` if the process that holds the run's lock on this machine has
    ended without a word, or if the lock is gone: a run gives it back after its last record, which
    did not fit on a full disk.

    Raises:
        UserError: the file is damaged.
    """
    state = _parse_state_file(run_dir / STATE_NAME)
    if state is None or state.state != "running":
        return state
    try:
        holder = LockHolder.read_from(run_dir / LOCK_NAME)
    except FileNotFoundError:
        state = _parse_state_file(run_dir / STATE_NAME)  # the run may have ended in between
        if state is None or state.state != "running":
            return state
        return replace(state, state="failed", reason="it ended and could not write its reason here")
    except OSError:
        return state
    if holder is not None and holder.has_ended():
        return replace(state, state="failed", reason=f"{holder} was killed")
    return state


def _parse_state_file(file: Path) -> RunState | None:
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
        return RunState(tree["state"], int(tree["step"]), str(tree["reason"]), str(tree["time"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise UserError(f"{file} is damaged: {error}; remove it") from None
