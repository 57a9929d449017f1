import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from dist_peft.core.errors import UserError
from dist_peft.core.stop_signals import StopRequested, catch_stop_signals
from dist_peft.data.worker_pool import count_usable_cores, map_in_processes


def list_children() -> list[int]:
    return [child.pid for child in psutil.Process().children()]


def test_results_come_in_order_whatever_takes_longest() -> None:
    def work(number: int) -> tuple[int, int]:
        time.sleep(0.02 if number % 4 == 0 else 0)
        return number, os.getpid()

    before = list_children()
    found = list(map_in_processes(work, iter(range(20)), 3))
    assert [number for number, _ in found] == list(range(20))
    processes = {pid for _, pid in found}
    assert os.getpid() not in processes
    assert len(processes) == 3
    assert list_children() == before
    assert not list(map_in_processes(work, iter([]), 2))


def test_no_more_than_a_few_items_are_read_ahead() -> None:
    read = []

    def items() -> Iterator[bytes]:
        for number in range(50):
            read.append(number)
            yield bytes(200_000)  # more than a pipe holds, in both directions

    results = map_in_processes(lambda data: data + b"x", items(), 2)
    assert len(next(results)) == 200_001
    assert len(read) <= 8
    results.close()


def test_the_error_of_the_first_item_is_raised() -> None:
    """Whichever process fails first; an error of reading comes behind all items before it."""

    def work(number: int) -> int:
        if number == 2:
            time.sleep(0.1)
        if number in (2, 4):
            raise UserError(f"bad record {number}")
        return number

    def items(stop: int) -> Iterator[int]:
        yield from range(stop)
        raise UserError("unreadable")

    for stop, message in ((2, "unreadable"), (3, "bad record 2"), (6, "bad record 2")):
        results = map_in_processes(work, items(stop), 3)
        assert [next(results), next(results)] == [0, 1]
        with pytest.raises(UserError, match=message):
            next(results)


def test_an_unexpected_error_comes_with_its_traceback() -> None:
    def fail(number: int) -> float:
        return 1 / number

    with pytest.raises(RuntimeError, match=r"(?s)in fail\n.*ZeroDivisionError"):
        list(map_in_processes(fail, iter([0]), 1))


def test_a_killed_process_is_one_error(tmp_path: Path) -> None:
    def work(number: int) -> int:
        if number == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return number

    before = list_children()
    with pytest.raises(UserError, match=r"killed by SIGKILL; .*memory: set data.workers"):
        list(map_in_processes(work, iter(range(9)), 2))
    assert list_children() == before


def test_a_stop_signal_to_the_whole_group_is_answered_by_the_parent() -> None:
    def work(number: int) -> int:
        for signal_number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(os.getpid(), signal_number)
        if number == 1:
            os.kill(os.getppid(), signal.SIGTERM)
            time.sleep(60)
        return number

    before = list_children()
    # where the process is ahead, the signal comes before the first result is taken
    with catch_stop_signals(), pytest.raises(StopRequested, match="SIGTERM"):
        list(map_in_processes(work, iter(range(9)), 1))
    assert list_children() == before
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_processes_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    parent = os.fork()
    if not parent:
        try:
            for pid in map_in_processes(lambda _: os.getpid(), iter(range(1000)), 3):
                (tmp_path / str(pid)).touch()
                if len(list(tmp_path.iterdir())) == 3:
                    os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(parent, 0)[1]) == -signal.SIGKILL
    pids = [int(path.name) for path in tmp_path.iterdir()]
    assert len(pids) == 3
    deadline = time.monotonic() + 30
    while any(psutil.pid_exists(pid) and not _is_zombie(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _is_zombie(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_the_environment_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in (None, "true"):
        monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
        if value:
            monkeypatch.setenv("TOKENIZERS_PARALLELISM", value)
        inside = map_in_processes(os.environ.get, iter(["TOKENIZERS_PARALLELISM"]), 1)
        assert list(inside) == ["false"]
        assert os.environ.get("TOKENIZERS_PARALLELISM") == value


def test_cores_are_those_of_this_process() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert count_usable_cores() == 1
    finally:
        os.sched_setaffinity(0, before)
    assert count_usable_cores() == len(before)
