"""An executable to be given to launchers in place of ``python``: scripts run in forked processes.

A rank that a launcher starts imports for five seconds of CPU time before it does anything, and the
launchers' tests start forty. Here a launcher starts the small program of
``forked_python_client.py``. It sends its arguments, environment, directory, standard files and
process number to the test's process, which has the server of ``tests.support.dist`` fork a process
that has everything imported. That one enters the client's host (its namespaces), and runs the
script. The client passes signals on, and ends as the script does; if it is killed, the script is
too.

Thus everything between a launcher and ``launch/train.py`` is real but for the interpreter's start.
Each launcher also has a test with a real interpreter.
"""

import ctypes
import json
import os
import runpy
import signal
import socket
import struct
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

import torch

from tests.support import forked_python_client
from tests.support.dist import call_in_process, make_process_context

NAMESPACES = ("net", "uts", "mnt")
"""Those that a host of ``tests.support.cluster`` has of its own; the mounts come last."""
REQUEST_SECONDS = 20
"""A client sends its request at once or was stopped; the others do not wait longer for it."""


@contextmanager
def serve_forked_python(directory: Path) -> Iterator[str]:
    """Give the path of the executable, in ``directory``; it works until the context ends."""
    call_in_process(os.getpid)  # the server imports now, not while a launcher's limits count
    address = str(directory / "socket")
    program = directory / "forked-python"
    program.write_text(
        f'#!/bin/sh\nexec {sys.executable} -IS {forked_python_client.__file__} {address} "$@"\n'
    )
    program.chmod(0o755)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen(16)
        ended, end = socket.socketpair()
        thread = threading.Thread(target=_serve, args=(listener, ended), daemon=True)
        thread.start()
        try:
            yield str(program)
        finally:
            end.close()
            thread.join(20)
            ended.close()


@dataclass
class _Script:
    """A client and the process that runs its script."""

    client: socket.socket
    process: BaseProcess


def _serve(listener: socket.socket, ended: socket.socket) -> None:
    """One thread for all clients: ``multiprocessing`` asks for ends of processes in a process's
    place when it starts another."""
    scripts: list[_Script] = []
    while True:
        waited: list[Any] = [listener, ended]
        for script in scripts:
            waited += [script.client, script.process.sentinel]
        ready = wait(waited)
        if ended in ready:
            for script in scripts:
                script.process.kill()
            return
        for script in list(scripts):
            if script.process.sentinel in ready:
                _report_end(script)
                scripts.remove(script)
            elif script.client in ready:
                _pass_signals_on(script)
        if listener in ready and (script := _accept(listener)) is not None:
            scripts.append(script)


def _accept(listener: socket.socket) -> _Script | None:
    """Return the script of the next client; None for one that was killed while it asked."""
    client, _ = listener.accept()
    client.settimeout(REQUEST_SECONDS)
    files: list[int] = []
    try:
        _, files, _, _ = socket.recv_fds(client, 1, 3)
        (size,) = struct.unpack("!I", client.recv(4, socket.MSG_WAITALL))
        request = json.loads(client.recv(size, socket.MSG_WAITALL))
        process = make_process_context().Process(  # type: ignore[attr-defined]
            target=_run_script, args=(request, [_Descriptor(file) for file in files]), daemon=True
        )
        process.start()
    except (OSError, struct.error, ValueError):
        client.close()
        return None
    finally:
        for file in files:
            os.close(file)
    return _Script(client, process)


def _pass_signals_on(script: _Script) -> None:
    try:
        numbers = script.client.recv(64)
    except OSError:  # reset: killed with an answer that it had not read
        numbers = b""
    if not numbers:  # the client was killed
        script.process.kill()
        script.process.join()
    process = script.process.pid
    assert process is not None
    for number in numbers:
        with suppress(ProcessLookupError):  # it ended since ``wait`` returned
            os.kill(process, number)


def _report_end(script: _Script) -> None:
    script.process.join()
    with suppress(OSError):  # a client that was killed
        script.client.sendall(struct.pack("!i", script.process.exitcode))
    script.client.close()


# -- in the forked process -------------------------------------------------------------------------


class _Descriptor:
    """An open file that travels to the forked process."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> tuple[Any, ...]:
        return _detach, (DupFd(self.number),)


def _detach(duplicate: Any) -> int:
    return int(duplicate.detach())


def _run_script(request: dict[str, Any], files: list[int]) -> None:
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    _enter_namespaces(request["process"])
    os.chdir(request["directory"])
    os.environ.clear()
    os.environ.update(request["environment"])
    for number in request["ignored"]:
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 - a forked process's is empty
    _run_words(request["words"])


def _run_words(words: list[str]) -> None:
    """Run ``[-u] [-m MODULE | SCRIPT] ARGUMENTS``; DeepSpeed puts an argument before the script."""
    place = next(number for number, word in enumerate(words) if not word.startswith("-"))
    before = [word for word in words[:place] if word != "-u"]
    if before == ["-m"]:
        sys.argv = words[place:]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [words[place], *before, *words[place + 1 :]]
        runpy.run_path(sys.argv[0], run_name="__main__")


def _enter_namespaces(process: int) -> None:
    """Move into the namespaces of a process, where they are others (``os.setns`` is of 3.12)."""
    libc = ctypes.CDLL(None, use_errno=True)
    for name in NAMESPACES:
        theirs, mine = (f"/proc/{who}/ns/{name}" for who in (process, "self"))
        if os.readlink(theirs) != os.readlink(mine):
            file = os.open(theirs, os.O_RDONLY)
            if libc.setns(file, 0) != 0:
                raise OSError(ctypes.get_errno(), f"cannot enter {theirs}")
            os.close(file)
