"""A fault in a command's own process, at a random moment of one of its phases.

A moment is a number: the n-th call, within the phase, of a function of this package or of a file
operation. An undisturbed run can count them (``Fault.kind`` "count"), so that a drawn number falls
anywhere in the phase. A number that is not reached fires when the phase ends.
"""

import io
import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NoReturn

import torch.distributed as dist

import dist_peft
from dist_peft.app import cli, trainer, training_run
from dist_peft.train import checkpoint, run_state
from tests.support.small_disk import fill_disk

__all__ = ["SIGNALS", "Fault", "FaultInjector"]

SIGNALS = ("SIGUSR1", "SIGTERM", "SIGINT", "SIGHUP")

VERB_PHASES = {"train": "load", "quantize": "solve", "merge": "merge", "export": "export"}
"""Verb -> the phase that a command is in outside of the inner phases below."""

INNER_PHASES: tuple[tuple[Any, str, str], ...] = (
    (training_run, "ensure_solved_base", "solve"),
    (trainer.Trainer, "run_training_loop", "step"),
    (trainer.Trainer, "finish_run", "gather"),
    (checkpoint.CheckpointManager, "save_checkpoint", "checkpoint"),
    (checkpoint, "write_staged_checkpoint", "checkpoint"),  # in a thread of its own
)

LAST_CHANCE = {"load", "solve", "merge", "export", "step", "gather"}
"""Phases that a command enters once: a fault that has not come strikes at their end."""

_PACKAGE = str(Path(dist_peft.__file__).parent)
_FILE_MODULES = {"posix", "_io", "fcntl"}


@dataclass(frozen=True)
class Fault:
    """A fault of one process.

    Attributes:
        kind: none, count (of moments), kill, stop, signal or full.
        phase: one of the phases above.
        rank: the process that is hit; the others run undisturbed.
        moment: number within the phase, from 0.
        delay: seconds after the moment; 0: exactly there.
        signal: name, for kind signal.
        everyone: the signal goes to all ranks.
        spare: bytes that stay free on the full disk.
        disk: the file system to fill, for kind full.
    """

    kind: str = "none"
    phase: str = ""
    rank: int = 0
    moment: int = 0
    delay: float = 0.0
    signal: str = ""
    everyone: bool = False
    spare: int = 0
    disk: str = ""

    def describe(self) -> str:
        what = {"signal": self.signal, "kill": "kill -9", "stop": "SIGSTOP", "full": "disk full"}
        at = f"{self.phase} {self.moment}" + (f" + {self.delay * 1000:.0f} ms" * bool(self.delay))
        return f"{what[self.kind]}{' to all' * self.everyone}, rank {self.rank}, {at}"


@dataclass
class FaultInjector:
    """Counts the moments of this process and strikes at one.

    Args:
        fault: of this process or of another rank.
        notes: directory for ``moments-RANK.json`` (counts by phase) and ``struck`` (when, whether
            the process was in the group of ranks, and the steps done).
    """

    fault: Fault
    rank: int
    notes: Path
    counts: Counter[str] = field(default_factory=Counter)
    _struck: bool = False
    _local: threading.local = field(default_factory=threading.local)
    _own_code: dict[CodeType, bool] = field(default_factory=dict)

    def arm(self, verb: str) -> None:
        """Watch this process from its first command on."""
        counts = self.fault.kind == "count"
        if self.fault.kind == "none" or not (counts or self.fault.rank == self.rank):
            return
        self._watch(cli, "main", VERB_PHASES[verb])
        leave = os._exit

        def end_and_leave(code: int) -> NoReturn:
            self._end_phase(VERB_PHASES[verb])  # several ranks leave before ``main`` returns
            leave(code)

        os._exit = end_and_leave  # type: ignore[assignment]
        for owner, name, phase in INNER_PHASES:
            self._watch(owner, name, phase)

    def _watch(self, owner: Any, name: str, phase: str) -> None:
        function = getattr(owner, name)

        @wraps(function)
        def watched(*args: Any, **kwargs: Any) -> Any:
            stack = self._get_stack()
            stack.append(phase)
            self._set_profile()
            try:
                return function(*args, **kwargs)
            finally:
                sys.setprofile(None)
                stack.pop()
                if phase not in stack:
                    self._end_phase(phase)
                self._set_profile()

        setattr(owner, name, watched)

    def _end_phase(self, phase: str) -> None:
        sys.setprofile(None)
        if self.fault.kind == "count":
            (self.notes / f"moments-{self.rank}.json").write_text(json.dumps(self.counts))
        elif phase == self.fault.phase and phase in LAST_CHANCE:
            self._strike()  # the moment was not reached

    def _get_stack(self) -> list[str]:
        if not hasattr(self._local, "stack"):
            self._local.stack = []
        return self._local.stack

    def _set_profile(self) -> None:
        stack = self._get_stack()
        wanted = self.fault.kind == "count" or (stack and stack[-1] == self.fault.phase)
        sys.setprofile(self._note_call if stack and wanted and not self._struck else None)

    def _note_call(self, frame: FrameType, event: str, arg: Any) -> None:
        if event == "call":
            code = frame.f_code
            own = self._own_code.get(code)
            if own is None:
                own = self._own_code[code] = code.co_filename.startswith(_PACKAGE)
        elif event == "c_call":
            of = getattr(arg, "__self__", None)
            own = isinstance(of, io.IOBase) or getattr(of, "__name__", "") in _FILE_MODULES
        else:
            return
        if own:
            phase = self._get_stack()[-1]
            self.counts[phase] += 1
            if self.fault.kind != "count" and self.counts[phase] > self.fault.moment:
                self._strike()

    def _strike(self) -> None:
        if self._struck:
            return
        self._struck = True
        sys.setprofile(None)
        if self.fault.delay:
            threading.Thread(target=self._act, daemon=True).start()
        else:
            self._act()

    def _act(self) -> None:
        time.sleep(self.fault.delay)
        struck = {"time": time.time(), "connected": dist.is_initialized()}
        struck |= {"step": run_state._noted_step}
        (self.notes / "struck").write_text(json.dumps(struck))
        if self.fault.kind == "full":
            fill_disk(Path(self.fault.disk), self.fault.spare)
        else:
            number = {"kill": "SIGKILL", "stop": "SIGSTOP", "signal": self.fault.signal}
            os.kill(os.getpid(), signal.Signals[number[self.fault.kind]])
