"""Real processes for tests: ``run_ranks(function, 3)`` runs it on 3 ranks that meet over gloo.

Ranks are forked from a server that has imported the libraries, so that a rank starts in a fraction
of a second instead of importing for five. Nothing else of the test's process is in them.
"""

import io
import multiprocessing as mp
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from typing import Any

import torch

from dist_peft.core.world import World
from tests.support.curves import skip_curves
from tests.support.tiers import note_process


def run_ranks(
    function: Callable[..., Any], size: int, *args: Any, timeout: float = 180
) -> list[Any]:
    """Call ``function(world, *args)`` on ``size`` processes; give what each returned.

    The function must be importable (module level). The first error is raised here with its rank
    and traceback; a rank that does not answer in ``timeout`` seconds is killed and named.
    """
    if size == 1:
        return [function(World(), *args)]
    note_process("ranks")
    context = make_process_context()
    port = free_port()
    children = []
    for rank in range(size):
        here, there = context.Pipe(duplex=False)
        process = context.Process(
            target=_child,
            args=(dict(os.environ), there, function, rank, size, port, args),
            daemon=True,
        )
        process.start()
        there.close()
        children.append((process, here))
    results = []
    try:
        for rank, (_, pipe) in enumerate(children):
            if not pipe.poll(timeout):
                raise TimeoutError(f"rank {rank} of {size} gave no answer in {timeout:g} s")
            try:
                results.append(torch.load(io.BytesIO(pipe.recv_bytes()), weights_only=False))
            except EOFError:
                results.append((False, "process died without a word"))
    finally:
        for process, _ in children:
            process.join(5 if len(results) == size else 0)
            if process.is_alive():
                process.kill()
    failed = [(r, text) for r, (good, text) in enumerate(results) if not good]
    if failed:
        raise AssertionError("\n".join(f"rank {r} of {size}:\n{text}" for r, text in failed))
    return [value for _, value in results]


def make_process_context() -> BaseContext:
    """Return where ranks are forked from (spawned, with CUDA)."""
    if torch.cuda.is_available():  # CUDA, once asked for its devices, does not survive a fork
        return mp.get_context("spawn")
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["dist_peft.app.commands.train", "tests.support.preloaded"])
    return context


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _child(
    environment: dict[str, str],
    pipe: Connection,
    function: Callable[..., Any],
    rank: int,
    size: int,
    port: int,
    args: Any,
) -> None:
    os.environ.clear()  # the server's is that of the first test
    os.environ.update(environment)
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    world = World(rank, size, rank, size, "test", "127.0.0.1", port)
    try:
        world.join_process_group(torch.device("cpu"), timeout_minutes=2)
        with skip_curves():
            value = function(world, *args)
        world.leave_process_group()
        answer = (True, value)
    except BaseException:
        answer = (False, traceback.format_exc())
    buffer = io.BytesIO()  # by value: a tensor sent as a handle would die with this process
    torch.save(answer, buffer)
    pipe.send_bytes(buffer.getvalue())


def call_in_process(function: Callable[..., Any], *args: Any, timeout: float = 180) -> Any:
    """Call ``function(*args)`` in a forked process of its own, which joins no group.

    Its error is raised here with its traceback.
    """
    note_process("a forked process")
    here, there = make_process_context().Pipe(duplex=False)
    process = make_process_context().Process(
        target=_call_alone, args=(dict(os.environ), there, function, args), daemon=True
    )
    process.start()
    there.close()
    try:
        if not here.poll(timeout):
            raise TimeoutError(f"no answer in {timeout:g} s")
        good, value = torch.load(io.BytesIO(here.recv_bytes()), weights_only=False)
    finally:
        process.join(5)
        if process.is_alive():
            process.kill()
    if not good:
        raise AssertionError(value)
    return value


def _call_alone(
    environment: dict[str, str], pipe: Connection, function: Callable[..., Any], args: Any
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    try:
        answer = (True, function(*args))
    except BaseException:
        answer = (False, traceback.format_exc())
    buffer = io.BytesIO()
    torch.save(answer, buffer)
    pipe.send_bytes(buffer.getvalue())
