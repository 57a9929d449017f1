"""Descriptors and store calls of a start on 64 and 512 ranks, without the ranks.

    python benchmarks/startup_calls.py [--ranks N ...] [--directory DIR]

The project's own rendezvous, agreement and wait run as N ranks, a thread each, on one store in
memory that counts their calls: register and read the verdict, wait for all before they connect,
compare the configuration (which begins with such a wait), and wait ``--seconds`` for one rank that
downloads. Then N ranks hold their two connections (the store's and
the heartbeat's) to a TCPStore in a process of its own, whose descriptors are counted. The mesh of a
gloo group, which needs a process a rank, is counted on two and four ranks.
"""

import argparse
import multiprocessing
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import torch.distributed as dist
from common import RESULTS, print_table, write_result

from dist_peft.core import rendezvous
from dist_peft.core.agreement import exchange_values
from dist_peft.core.launchers import LaunchInfo
from dist_peft.core.machine import raise_open_file_limit
from dist_peft.core.patient_wait import wait_for_all_ranks

CONFIG = {f"section.key_{n}": n for n in range(120)}
"""As many keys as a run's configuration has."""


class CountingStore:
    """A store in memory that counts the calls of each phase and of rank 0."""

    def __init__(self, calls: "Calls", rank: int) -> None:
        self._calls, self._rank = calls, rank

    def set(self, key: str, value: str) -> None:
        self._calls.count(self._rank)
        with self._calls.lock:
            self._calls.values[key] = value.encode()

    def get(self, key: str) -> bytes:
        self._calls.count(self._rank)
        while key not in self._calls.values:
            time.sleep(0.01)
        return self._calls.values[key]

    def check(self, keys: list[str]) -> bool:
        self._calls.count(self._rank)
        return all(key in self._calls.values for key in keys)

    def add(self, key: str, amount: int) -> int:
        self._calls.count(self._rank)
        with self._calls.lock:
            total = int(self._calls.values.get(key, b"0")) + amount
            self._calls.values[key] = str(total).encode()
        return total


class Calls:
    """What all ranks' stores share."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.values: dict[str, bytes] = {}
        self.by_rank: Counter[int] = Counter()

    def count(self, rank: int) -> None:
        with self.lock:
            self.by_rank[rank] += 1


@dataclass(frozen=True)
class PhaseCalls:
    """Store calls of one phase of the start."""

    ranks: int
    phase: str
    total: int
    of_rank_0: int
    most_of_another: int
    seconds: float


def count_phase(
    ranks: int, phase: str, run: Callable[[int, CountingStore], None], calls: Calls
) -> PhaseCalls:
    """Run one phase on all ranks, a thread each."""
    calls.by_rank.clear()
    threads = [
        threading.Thread(target=run, args=(r, CountingStore(calls, r))) for r in range(ranks)
    ]
    start = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    others = [calls.by_rank[rank] for rank in range(1, ranks)]
    return PhaseCalls(
        ranks,
        phase,
        sum(calls.by_rank.values()),
        calls.by_rank[0],
        max(others),
        time.monotonic() - start,
    )


def count_store_calls(ranks: int, seconds: float) -> list[PhaseCalls]:
    """Return the calls of each phase of a start on ``ranks`` ranks, eight a node."""
    hosts = [f"node{rank // 8}" for rank in range(ranks)]
    calls = Calls()

    def meet(rank: int, store: CountingStore) -> None:
        place = LaunchInfo(rank, ranks, rank % 8, 8, "slurm", "node0", 1, hosts[rank])
        end = time.monotonic() + 60
        store.set(f"device/{rank}", f"uuid-{rank}")
        rendezvous._register_rank(store, place, None, "node0:1", {"run": "1"})  # type: ignore[arg-type]
        if rank == 0:
            rendezvous._wait_for_all_ranks(store, place, "node0:1", end, 60)  # type: ignore[arg-type]
        rendezvous._read_verdict(store, place, "node0:1", end, 60)  # type: ignore[arg-type]

    def connect(rank: int, store: CountingStore) -> None:
        wait_for_all_ranks(store, rank, hosts, "wait/0", "connect the ranks")

    def compare(rank: int, store: CountingStore) -> None:
        come = partial(wait_for_all_ranks, store, rank, hosts, "wait/1", "compare")
        assert exchange_values(store, rank, hosts, "same/1", CONFIG, 60, come) == ""

    def wait(rank: int, store: CountingStore) -> None:
        if rank == ranks // 2:
            time.sleep(seconds)
        wait_for_all_ranks(store, rank, hosts, "wait/2", "download")

    phases = {
        "rendezvous": meet,
        "connect": connect,
        "compare": compare,
        f"wait {seconds:g} s": wait,
    }
    return [count_phase(ranks, name, run, calls) for name, run in phases.items()]


def serve_store(pipe: Connection) -> None:
    """Serve a TCPStore and answer each message with the number of open descriptors."""
    raise_open_file_limit()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipe.send(store.port)
    while pipe.recv():
        pipe.send(len(os.listdir("/proc/self/fd")))


def count_store_descriptors(ranks: int) -> int:
    """Return the descriptors of rank 0 for the connections of ``ranks`` ranks, two each."""
    raise_open_file_limit()
    here, there = multiprocessing.get_context("fork").Pipe()
    process = multiprocessing.get_context("fork").Process(target=serve_store, args=(there,))
    process.start()
    there.close()
    port = here.recv()
    here.send(True)
    before = here.recv()
    stores = [
        dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
        for _ in range(2 * ranks)
    ]
    stores[-1].set("all", "here")
    here.send(True)
    after: int = here.recv()
    here.send(False)
    process.join()
    return after - int(before)


def join_gloo_group(rank: int, ranks: int, port: int, pipe: Connection) -> None:
    """Count the sockets of one more gloo group with one collective."""
    store = dist.TCPStore("127.0.0.1", port, is_master=rank == 0, wait_for_workers=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    dist.barrier()
    before = len(os.listdir("/proc/self/fd"))
    dist.barrier(dist.new_group(backend="gloo"))
    pipe.send(len(os.listdir("/proc/self/fd")) - before)
    dist.barrier()


def count_gloo_descriptors(ranks: int) -> int:
    """Return the descriptors that one gloo group costs a rank."""
    context = multiprocessing.get_context("fork")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    here, there = context.Pipe()
    processes = [
        context.Process(target=join_gloo_group, args=(rank, ranks, port, there))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    counts = [here.recv() for _ in range(ranks)]
    for process in processes:
        process.join()
    return int(max(counts))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", nargs="+", type=int, default=[64, 512])
    parser.add_argument("--seconds", type=float, default=10.0, help="of the download")
    parser.add_argument("--directory", type=Path, default=RESULTS, help="of the result")
    args = parser.parse_args(arguments)
    gloo = {ranks: count_gloo_descriptors(ranks) for ranks in (2, 4)}
    phases = [calls for ranks in args.ranks for calls in count_store_calls(ranks, args.seconds)]
    descriptors = {ranks: count_store_descriptors(ranks) for ranks in args.ranks}
    print_table(
        ("ranks", "phase", "calls", "of rank 0", "most of another", "seconds"),
        [list(asdict(calls).values()) for calls in phases],
    )
    print_table(("ranks", "descriptors of rank 0's store"), list(map(list, descriptors.items())))
    print_table(("ranks", "descriptors of a rank for a gloo group"), list(map(list, gloo.items())))
    found = {
        "phases": [asdict(calls) for calls in phases],
        "store_descriptors": {str(ranks): count for ranks, count in descriptors.items()},
        "gloo_group_descriptors": {str(ranks): count for ranks, count in gloo.items()},
    }
    write_result("startup_calls", [found], args.directory)


if __name__ == "__main__":
    main()
