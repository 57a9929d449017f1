"""Meeting of ranks (threads here: each has its own connection), and those who do not come."""

import threading
import time
from typing import Any

import psutil
import pytest
import torch.distributed as dist

from dist_peft.core import rendezvous as module
from dist_peft.core.launchers import LaunchInfo
from dist_peft.core.rendezvous import Rendezvous, RendezvousError, join_rendezvous
from dist_peft.core.stop_signals import (
    StopRequested,
    catch_stop_signals,
    describe_stop_request,
    request_stop,
)
from dist_peft.core.world import World
from tests.support.dist import free_port, run_ranks


def come(
    places: list[LaunchInfo],
    seconds: float = 20,
    tokens: list[dict[str, str]] | None = None,
    devices: str = "",
) -> list[Any]:
    """What each place got out of ``meet``: a meeting, or the error's text."""
    results: list[Any] = [None] * len(places)

    def run(i: int) -> None:
        try:
            results[i] = join_rendezvous(
                places[i], seconds, tokens and tokens[i], devices[i : i + 1]
            )
        except (RendezvousError, StopRequested) as error:
            results[i] = str(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(places))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


def place(rank: int, size: int, port: int, **changes: Any) -> LaunchInfo:
    fields = {"launcher": "test", "address": "127.0.0.1", "port": port, "host": f"host{rank}"}
    return LaunchInfo(rank, size, rank, size, **{**fields, **changes})


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PULSE_SECONDS", 0.1)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)


def test_all_come() -> None:
    port = free_port()
    meetings: list[Rendezvous] = come([place(r, 3, port) for r in range(3)])
    assert [m.hosts for m in meetings] == [["host0", "host1", "host2"]] * 3
    meetings[2].store.set("key", "value")
    assert meetings[0].store.get("key") == b"value"
    assert meetings[1].background_store.get("key") == b"value"
    assert meetings[1].background_store is not meetings[1].store
    for m in meetings:
        m.close()


def test_missing_ranks_and_hosts_are_named_to_all() -> None:
    port = free_port()
    hosts = ("host0", "host2", "host7")
    start = time.monotonic()
    texts = come([place(r, 6, port, hosts=hosts) for r in (0, 2)], seconds=1)
    assert time.monotonic() - start < 10
    for text in texts:
        assert f"ranks 1, 3-5 of 6 did not come to 127.0.0.1:{port} within 1 s" in text
        assert "no rank came from host7" in text
        assert "ranks 0, 2 came from host0, host2" in text


def test_missing_rank_0_is_named() -> None:
    port = free_port()
    (text,) = come([place(1, 2, port)], seconds=0.5)
    assert f"rank 1 on host1 could not reach rank 0 at 127.0.0.1:{port} within 0.5 s" in text
    assert "connection refused" in text


def test_agent_serves_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under torchrun; rank 0 missing, the others end by themselves."""
    agent = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    meetings = come([place(r, 2, agent.port, agent=0) for r in range(2)])
    assert [m.hosts for m in meetings] == [["host0", "host1"]] * 2
    for m in meetings:
        m.close()
    monkeypatch.setattr(module, "GRACE_SECONDS", 0.2)
    (text,) = come([place(1, 2, agent.port, agent=1)], seconds=0.5)
    assert "rank 0 of 2 did not come" in text


def test_two_runs_on_one_address_are_refused() -> None:
    port = free_port()
    texts = come([place(0, 3, port), place(1, 3, port), place(1, 3, port)], seconds=1)
    assert sum("another process has come" in text for text in texts) == 1
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    (text,) = come([place(0, 2, server.port)], seconds=1)
    assert "is taken there; set MASTER_PORT" in text


def test_ranks_of_two_runs_are_refused_together() -> None:
    """The second run's rank 1 is faster than the first one's."""
    port = free_port()
    own, other = ({"run": f"SLURM step {n}.0", "command": "train"} for n in (7, 8))
    texts = come([place(r, 3, port) for r in range(3)], tokens=[own, other, own])
    assert len(set(texts)) == 1
    assert (
        f'ranks of different runs met at 127.0.0.1:{port}: run is "SLURM step 7.0" on ranks 0, 2 '
        '(host0, host2) and "SLURM step 8.0" on rank 1 (host1). Give each run a MASTER_PORT'
    ) in texts[0]


def test_other_verb_or_version_is_refused() -> None:
    for key in ("command", "version of dist_peft", "device"):
        port = free_port()
        texts = come([place(r, 2, port) for r in range(2)], tokens=[{key: "a"}, {key: "b"}])
        assert texts[0] == texts[1] and f'{key} is "a" on rank 0' in texts[0]


def test_values_are_compared_again_and_again() -> None:
    port = free_port()
    meetings: list[Rendezvous] = come([place(r, 2, port) for r in range(2)])
    found: list[list[str]] = [[], []]

    def run(rank: int) -> None:
        for values in ({"a": 1}, {"a": rank}, {"a": 2}):
            found[rank].append(meetings[rank].find_disagreement(values, 20))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == [["", "a is 0 on rank 0 (host0) and 1 on rank 1 (host1)", ""]] * 2
    for m in meetings:
        m.close()


def test_different_sizes_are_refused() -> None:
    port = free_port()
    texts = come([place(0, 2, port), place(1, 3, port)])
    assert texts[0] == texts[1]
    assert "rank 0 was started with a world size of 2, rank 1 on host1 with 3" in texts[0]


def test_interface_that_leads_to_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    routes = {"10.0.0.2": "10.0.0.1"}
    monkeypatch.setattr(module, "find_local_address_towards", lambda a, _: routes[a])
    monkeypatch.setattr(module, "find_interface", {"10.0.0.1": "ib0", "10.0.0.2": "ib1"}.get)
    table = [("a", "127.0.1.1"), ("b", "10.0.0.2")]
    module._choose_interface(place(0, 2, 9), table, 9)  # own name is loopback: ask for the way to b
    assert module.os.environ.pop("GLOO_SOCKET_IFNAME") == "ib0"
    module._choose_interface(place(1, 2, 9), table, 9)
    assert module.os.environ["GLOO_SOCKET_IFNAME"] == "ib1"
    module._choose_interface(place(0, 2, 9), table, 9)  # what is set stays
    assert module.os.environ.pop("GLOO_SOCKET_IFNAME") == "ib1"
    module._choose_interface(place(0, 2, 9), [("a", "127.0.0.1")] * 2, 9)  # one host
    assert "GLOO_SOCKET_IFNAME" not in module.os.environ


def list_listening_hosts(world: World) -> list[str]:
    found = psutil.Process().net_connections("tcp")
    return sorted({c.laddr.ip for c in found if c.status == psutil.CONN_LISTEN})


@pytest.mark.dist
def test_ranks_of_one_host_listen_on_its_loopback_interface_alone() -> None:
    """The store, and gloo on each rank."""
    assert run_ranks(list_listening_hosts, 2) == [["127.0.0.1"]] * 2


def test_ranks_with_one_device_are_refused() -> None:
    port = free_port()
    texts = come([place(r, 3, port) for r in range(3)], devices="ABA")
    assert set(texts) == {texts[0]}
    assert texts[0].startswith("ranks 0, 2 on host0 have the same CUDA device; start one process")


def test_signal_ends_the_wait_for_missing_ranks() -> None:
    port = free_port()
    with catch_stop_signals():
        threading.Timer(0.3, lambda: request_stop("SIGUSR1")).start()
        start = time.monotonic()
        texts = come([place(r, 3, port) for r in (0, 2)])
        assert texts == ["stopped on SIGUSR1 while rank 1 had not come"] * 2
        (alone,) = come([place(1, 3, port)])
        assert alone == "stopped on SIGUSR1" and time.monotonic() - start < 10


def test_signal_to_one_rank_becomes_known_to_all() -> None:
    """Threads share the list of signals, so rank 1's is written to the store as its own would."""
    port = free_port()
    meetings: list[Rendezvous] = come([place(r, 2, port) for r in range(2)])
    with catch_stop_signals() as stop:
        time.sleep(0.5)
        assert not stop()
        meetings[1].store.set("stop", "SIGTERM")
        end = time.monotonic() + 10
        while not stop() and time.monotonic() < end:
            time.sleep(0.05)
        assert describe_stop_request() == "SIGTERM on another rank"
    for m in meetings:
        m.close()
