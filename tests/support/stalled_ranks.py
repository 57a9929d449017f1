"""Ranks of ``dist-peft train`` that go wrong: forked from the server of ``tests.support.dist``."""

import ctypes
import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from dist_peft.app import cli
from dist_peft.core import patient_wait, stall_judge, world
from dist_peft.data.loader import Loader
from dist_peft.engine import fsdp2
from dist_peft.train import checkpoint_writer
from tests.support.curves import skip_curves
from tests.support.dist import make_process_context

SECOND_STEP = 3
"""Which call of ``_make_batches`` it is; the first one is that of the evaluation before."""


_notes: Path | None = None
"""Where this process notes that it goes wrong."""


@dataclass(frozen=True)
class EndedRank:
    """How a rank ended.

    Attributes:
        code: exit code; None: it did not end.
        seconds: from the first moment that a rank went wrong; from the start, where none did.
        text: its stderr.
    """

    code: int | None
    seconds: float
    text: str

    @property
    def last_line(self) -> str:
        return self.text.rstrip("\n").rpartition("\n")[2]


def stick_in_loader() -> None:
    """Read the second step's data from a file system that answers no more."""
    _replace(Loader, "_make_batches", lambda: time.sleep(600), SECOND_STEP)


def freeze_in_loader() -> None:
    """Freeze the process as it begins the second step."""
    _replace(Loader, "_make_batches", lambda: os.kill(os.getpid(), signal.SIGSTOP), SECOND_STEP)


def block_in_collective() -> None:
    """Block in C, without the GIL, in the collectives of the second step, as NCCL's do."""
    _replace(Loader, "_make_batches", _block_all_gathers, SECOND_STEP)


def _block_all_gathers() -> None:
    def block(*_: Any, **__: Any) -> None:
        ctypes.CDLL(None).sleep(600)

    mock.patch.object(fsdp2, "all_gather_chunks", block).start()


def run_out_of_memory() -> None:
    """Fail as torch does on a full GPU, in the second step."""

    def fail() -> None:
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.10 "
            "GiB of which 1.20 GiB is free. Including non-PyTorch memory, this process has 77.9"
        )

    _replace(Loader, "_make_batches", fail, SECOND_STEP)


def die_before_the_group() -> None:
    """Die after all ranks have met, before they are connected."""
    mock.patch.object(world, "StallWatch", side_effect=lambda *_: os._exit(9)).start()


def die_while_others_connect() -> None:
    """Die as the ranks make the process group of the checkpoint writers."""
    die = mock.patch.object(checkpoint_writer.dist, "new_group", side_effect=lambda **_: _die())
    die.start()


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def name_unconnected_ranks_early() -> None:
    """Take a rank for dead after three seconds of silence while this one connects to it."""
    mock.patch.object(stall_judge, "CONNECT_SECONDS", 3.0).start()


def find_dead_ranks_early() -> None:
    """Take a rank for dead after a second without a heartbeat."""
    mock.patch.object(patient_wait, "WATCH_SECONDS", 1.0).start()
    mock.patch.object(patient_wait, "LOOK_SECONDS", 0.5).start()


def evaluate_slowly() -> None:
    """Take longer for each evaluation than a step may."""
    _replace(Loader, "load_all_sequential", lambda: time.sleep(2.5), call=2)


def _replace(owner: type, name: str, action: Callable[[], object], call: int) -> None:
    """Call ``action`` before call number ``call`` of a method."""
    original, calls = getattr(owner, name), [0]

    def method(self: Any, *args: Any, **keywords: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            assert _notes is not None
            (_notes / f"wrong-{os.getpid()}").write_text(str(time.monotonic()))
            action()
        return original(self, *args, **keywords)

    setattr(owner, name, method)


def run_rank(
    environment: Mapping[str, str], log: Path, config: Path, spoil: Callable[[], None] | None
) -> None:
    """Be one rank of ``dist-peft train --config config``, with stderr in ``log``."""
    global _notes
    _notes = log.parent
    with log.open("ab") as out:
        os.dup2(out.fileno(), 2)
        os.dup2(out.fileno(), 1)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    if spoil is not None:
        spoil()
    with skip_curves():
        code = cli.main(["train", "--config", str(config)])
    os._exit(code)


def run_spoilt_ranks(
    config: Path,
    port: int,
    size: int,
    spoilt: Mapping[int, Callable[[], None]],
    *,
    seconds: float = 60,
    survivors: int | None = None,
) -> list[EndedRank]:
    """Run ``size`` ranks, some of them spoilt; wait for ``survivors`` (all) and kill the rest."""
    processes: list[BaseProcess] = []
    logs = [config.parent / f"stderr-{rank}" for rank in range(size)]
    try:
        for rank, log in enumerate(logs):
            names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
            names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            environment = {**os.environ, **{key: str(value) for key, value in names.items()}}
            process = make_process_context().Process(
                target=run_rank, args=(environment, log, config, spoilt.get(rank)), daemon=True
            )
            process.start()
            processes.append(process)
        start, ended = time.monotonic(), dict[int, float]()
        while len(ended) < (survivors or size) and time.monotonic() < start + seconds:
            time.sleep(0.05)
            for rank, process in enumerate(processes):
                if process.exitcode is not None:
                    ended.setdefault(rank, time.monotonic())
        wrong = [float(file.read_text()) for file in config.parent.glob("wrong-*")]
        start, end = min(wrong, default=start), time.monotonic()
        return [
            EndedRank(process.exitcode, ended.get(rank, end) - start, log.read_text())
            for rank, (process, log) in enumerate(zip(processes, logs, strict=True))
        ]
    finally:
        for process in processes:
            process.kill()
            process.join(10)
