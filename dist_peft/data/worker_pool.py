"""Map a function over items in forked processes, with results in the order of the items.

The processes are forks, which inherit the function and whatever it refers to (a tokenizer, say)
without starting a Python each. They are forked also after CUDA or collectives are in use, as
PyTorch's ``DataLoader`` does: they call no torch function and end with ``os._exit``, so that
nothing of the caller's is flushed, closed or freed twice. Items and results go through pipes that
no other program can open.

A process ignores the stop signals, which a terminal or a scheduler sends to the whole group: the
caller decides and ends them. If the caller is killed, their pipes close and they end by themselves.
"""

import gc
import os
import signal
import traceback
import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any, NoReturn, TypeVar

from dist_peft.core.errors import UserError
from dist_peft.core.stop_signals import STOP_SIGNALS, raise_if_stop_requested

__all__ = ["count_usable_cores", "map_in_processes"]

T = TypeVar("T")
R = TypeVar("R")

_LOOK_SECONDS = 0.2
"""Time between two looks for a stop signal while no result comes."""

_WAITING = 3
"""Results of a process, on average, that may wait for an earlier one of another process."""


def count_usable_cores() -> int:
    """Return the number of cores that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return cores or 1


def map_in_processes(
    function: Callable[[T], R], items: Iterator[T], processes: int
) -> Generator[R, None, None]:
    """Yield ``function(item)`` of each item, in the order of the items.

    Args:
        function: called in a forked process; its changes are not seen here.
        items: iterated here, at most a few for each process ahead of the results; they and the
            results are pickled. An error of the iterator is raised behind the results before it.
        processes: at least 1.

    Raises:
        UserError: of ``function``, with the same text, after the results of earlier items; or a
            process was killed.
        RuntimeError: any other error of ``function``, with its traceback as text.
        StopRequested: a signal has reached this process.
    """
    workers: list[_Worker] = []
    try:
        with _prepare_to_fork() as mask:
            for _ in range(processes):
                workers.append(_fork_worker(function, workers, mask))
        yield from _collect_results(workers, items)
    finally:
        for worker in workers:
            worker.kill()


def _collect_results(workers: "list[_Worker]", items: Iterator[Any]) -> Iterator[Any]:
    """Send items to idle workers, and yield the results in order."""
    sent = taken = 0
    found: dict[int, Any] = {}  # results that wait for earlier ones
    failure: Exception | None = None
    finished = False
    while True:
        for worker in workers:
            if finished or sent - taken >= _WAITING * len(workers):
                break
            if worker.item is not None:
                continue
            try:
                item = next(items)
            except StopIteration:
                finished = True
                break
            except Exception as error:
                failure, finished = error, True
                break
            worker.send(sent, item)
            sent += 1
        raise_if_stop_requested()
        if taken in found:
            result = found.pop(taken)
            if isinstance(result, _Failure):
                result.raise_again()
            taken += 1
            yield result
        elif any(worker.item is not None for worker in workers):
            ready = wait([worker.pipe for worker in workers], _LOOK_SECONDS)
            for worker in workers:
                if worker.pipe in ready:
                    number, found_now = worker.receive()
                    found[number] = found_now
        else:
            break
    if failure is not None:
        raise failure


@dataclass(frozen=True)
class _Failure:
    """An error of the function, as text."""

    is_user_error: bool
    text: str

    def raise_again(self) -> NoReturn:
        if self.is_user_error:
            raise UserError(self.text)
        raise RuntimeError(f"a worker process failed:\n{self.text}")


class _Worker:
    """A forked process, as its parent sees it.

    Attributes:
        item: number of the item that it works on.
    """

    def __init__(self, pid: int, pipe: "Connection[Any, Any]") -> None:
        self.pipe = pipe
        self.item: int | None = None
        self._pid = pid
        self._ended = False

    def send(self, number: int, item: Any) -> None:
        """Send an item to the idle process."""
        try:
            self.pipe.send(item)
        except OSError:
            self._raise_ended()
        self.item = number

    def receive(self) -> tuple[int, Any]:
        """Return the number of the item and its result, or its ``_Failure``."""
        try:
            found = self.pipe.recv()
        except (EOFError, OSError):
            self._raise_ended()
        number, self.item = self.item, None
        assert number is not None
        return number, found

    def _raise_ended(self) -> NoReturn:
        raise_if_stop_requested()
        code = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        self._ended = True
        how = f"ended with exit code {code}"
        if code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
        raise UserError(
            f"worker process {self._pid}, which tokenizes records, {how}; it may have run out of "
            "memory: set data.workers to fewer processes (1: none)"
        )

    def kill(self) -> None:
        """End the process, whatever it does, and wait for its end."""
        self.pipe.close()
        if not self._ended:
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
            self._ended = True


@contextmanager
def _prepare_to_fork() -> Iterator[set[int]]:
    """Block the stop signals inside, which a child must not handle as its parent does.

    Yields the signals that were blocked before. The threads of ``tokenizers`` do not exist in a
    child, which must therefore use none.
    """
    name = "TOKENIZERS_PARALLELISM"
    before, mask = os.environ.get(name), signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    os.environ[name] = "false"
    try:
        with warnings.catch_warnings():
            # Python 3.12 warns of threads, whose locks a child would find held: it takes none
            warnings.simplefilter("ignore", DeprecationWarning)
            yield {int(number) for number in mask}
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _fork_worker(
    function: Callable[[Any], Any], siblings: "list[_Worker]", mask: set[int]
) -> _Worker:
    ours, theirs = Pipe()
    pid = os.fork()
    if pid:
        theirs.close()
        return _Worker(pid, ours)
    try:
        # else a pipe would stay open when the parent has ended
        for pipe in (ours, *(worker.pipe for worker in siblings)):
            pipe.close()
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        gc.freeze()  # a collection would write to, and so copy, the pages shared with the parent
        _serve_items(function, theirs)
    finally:
        os._exit(0)


def _serve_items(function: Callable[[Any], Any], pipe: "Connection[Any, Any]") -> None:
    """Answer items until the parent closes the pipe, or ends."""
    with suppress(EOFError, OSError):
        while True:
            item = pipe.recv()
            try:
                answer = function(item)
            except UserError as error:
                answer = _Failure(True, str(error))
            except BaseException:
                answer = _Failure(False, traceback.format_exc())
            pipe.send(answer)
