"""The ranks of one command: forked after the imports, with the launcher's variables of torchrun."""

import faulthandler
import json
import multiprocessing.process
import os
import runpy
import signal
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.faults.injection import SIGNALS, Fault, FaultInjector
from tests.support.curves import skip_curves
from tests.support.dist import free_port, make_process_context

__all__ = ["Ended", "Limits", "run_command"]

ROOT = Path(__file__).resolve().parents[2]
_START = threading.Lock()
"""``multiprocessing`` starts one process at a time."""


@dataclass(frozen=True)
class Limits:
    """Seconds from the fault to the end of every process.

    Attributes:
        connected: where the rank that was hit was in the group of ranks; also of one process.
        alone: where it was not: the others may wait for it to come.
    """

    connected: float
    alone: float


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        codes: exit code by rank, negative for a signal; None: it did not end in time.
        seconds: from the fault to the last exit (from the start, where no fault struck).
        struck: whether the fault came.
        outputs: stderr of each rank.
        last_writer: the rank that wrote to stderr last.
        connected: whether the rank that was hit was in the group of ranks.
        step: the steps that it had done.
        seconds_of_others: from the fault to the last exit of a rank that was not hit.
    """

    codes: tuple[int | None, ...]
    seconds: float
    struck: bool
    outputs: tuple[str, ...]
    last_writer: int = 0
    connected: bool = True
    step: int = 0
    seconds_of_others: float = 0.0

    @property
    def stderr(self) -> str:
        """Of all ranks; the one that wrote last comes last."""
        last = self.last_writer
        return "".join([*self.outputs[:last], *self.outputs[last + 1 :], self.outputs[last]])


def run_command(
    argv: Sequence[str], ranks: int, notes: Path, fault: Fault, limits: Limits, freeze: float = 0.0
) -> Ended:
    """Run ``dist-peft ARGV`` on ``ranks`` processes until all have ended.

    Args:
        notes: new directory for stderr, stacks and notes of the injection.
        freeze: a stopped rank continues after so many seconds; 0: when all others have ended.
    """
    notes.mkdir(parents=True)
    port, processes = free_port(), []
    for rank in range(ranks):
        env = {} if ranks == 1 else _make_launcher_variables(rank, ranks, port)
        with _START:
            process = make_process_context().Process(
                target=_run_rank,
                args=(list(argv), {**os.environ, **env}, rank, notes, fault, limits),
                daemon=True,
            )
            process.start()
        processes.append(process)
    began, others_ended = time.time(), 0.0
    sent = continued = False
    while any(p.is_alive() for p in processes):
        hit, connected, _ = _read_strike(notes)
        now = time.time()
        seconds = limits.connected if connected or ranks == 1 else limits.alone
        if now - (hit or began) > (seconds if hit else 4 * seconds):
            break
        if hit and fault.everyone and not sent:
            sent = True
            for rank, process in enumerate(processes):
                if rank != fault.rank:
                    _send(process, signal.Signals[fault.signal])
        others = [p for r, p in enumerate(processes) if r != fault.rank]
        if hit and any(p.is_alive() for p in others):
            others_ended = now - hit
        if hit and fault.kind == "stop" and not continued:
            over = now - hit > freeze if freeze else not any(p.is_alive() for p in others)
            if over:
                continued = True
                _send(processes[fault.rank], signal.SIGCONT)
        time.sleep(0.02)
    codes = []
    for process in processes:
        alive = process.is_alive()
        codes.append(None if alive else process.exitcode)
        if alive:
            process.kill()
        process.join()
    hit, connected, step = _read_strike(notes)
    seconds = time.time() - (hit or began)
    files = [notes / f"stderr-{rank}" for rank in range(ranks)]
    return Ended(
        tuple(codes),
        seconds,
        hit is not None,
        tuple(file.read_text(errors="replace") if file.exists() else "" for file in files),
        max(range(ranks), key=lambda r: files[r].stat().st_mtime_ns if files[r].exists() else 0),
        connected,
        step,
        others_ended,
    )


def _send(process: multiprocessing.process.BaseProcess, number: int) -> None:
    if process.is_alive() and process.pid is not None:
        with suppress(ProcessLookupError):
            os.kill(process.pid, number)


def _read_strike(notes: Path) -> tuple[float | None, bool, int]:
    """Return when the fault struck, whether the process was in the group of ranks, steps done."""
    try:
        told = json.loads((notes / "struck").read_text())
        return told["time"], told["connected"], told["step"]
    except (FileNotFoundError, ValueError):
        return None, False, 0


def _make_launcher_variables(rank: int, ranks: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _run_rank(
    argv: list[str], env: dict[str, str], rank: int, notes: Path, fault: Fault, limits: Limits
) -> None:
    for name in SIGNALS:  # nohup ignores SIGHUP, and a process inherits that
        default = signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL
        signal.signal(signal.Signals[name], default)
    os.environ.clear()
    os.environ.update(env)
    torch.set_num_threads(1)
    output = os.open(notes / f"stderr-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    stacks = (notes / f"stacks-{rank}").open("w")
    faulthandler.dump_traceback_later(max(1.0, limits.connected - 2), file=stacks)
    FaultInjector(fault, rank, notes).arm(argv[0])
    sys.argv = ["dist-peft", *argv]
    with skip_curves():
        runpy.run_module("dist_peft", run_name="__main__")
