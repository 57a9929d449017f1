"""Rendezvous of the ranks through a key-value store, with messages about missing ranks.

Rank 0 serves a key-value store at the rendezvous address (under torchrun its agent does). Every
rank registers there with its host; rank 0 counts, and when all have come, or the time is over,
writes one verdict that all read. So each rank ends within the same bounded time, with a message
that names the missing ranks or the address that did not answer. The store then serves torch's
process group.

Each rank also brings a token: the launcher's name of the run, the command and the versions. Ranks
of two runs that meet at one address differ in it, and are refused together.

Later each rank counts up a number of its own in the store every few seconds. When a collective
fails because a rank died, the numbers that stand still identify it. With them a signal to one rank
becomes known to all (``core.stop_signals``).

Ranks wait here for one that downloads or tokenizes (``wait_for_all``): a collective would end after
its time limit, and does not know whether the others are alive.
"""

import contextlib
import errno
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, cast

import torch.distributed as dist

from dist_peft.core.agreement import describe_differences, exchange_values, format_ranks
from dist_peft.core.errors import UserError
from dist_peft.core.launchers import LaunchInfo
from dist_peft.core.mpi import exchange_master_address
from dist_peft.core.network import (
    explain_absent_interface,
    find_interface,
    find_local_address_towards,
    is_loopback,
    listen_at_address,
    wait_for_port,
)
from dist_peft.core.patient_wait import confirm_answer_read, wait_for_all_ranks
from dist_peft.core.stop_signals import (
    StopRequested,
    describe_stop_request,
    is_stop_requested,
    request_stop,
)

__all__ = ["Rendezvous", "RendezvousError", "join_rendezvous"]

log = logging.getLogger("dist_peft")

POLL_SECONDS = 0.1
GRACE_SECONDS = 5.0
REMIND_SECONDS = 30.0
PULSE_SECONDS = 2.0


class RendezvousError(UserError):
    """The rendezvous failed. Every rank reports its own error, not only the first."""


class Rendezvous:
    """The state shared by all ranks after the rendezvous: a store and the host of each rank.

    Attributes:
        store: for torch's process group.
        hosts: the host of each rank.
    """

    def __init__(
        self, place: LaunchInfo, store: dist.Store, own_store: dist.Store, hosts: list[str]
    ) -> None:
        """Take ``own_store``, another connection, for the heartbeat thread of this rank."""
        self.store = store
        self.hosts = hosts
        self._rank = place.rank
        self._topics = self._waits = 0
        self._has_told_stop = False
        self._own_store = own_store
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._send_heartbeats, daemon=True)
        self._thread.start()

    def _send_heartbeats(self) -> None:
        while not self._stop.wait(PULSE_SECONDS):
            try:
                self._own_store.add(f"pulse/{self._rank}", 1)
                self._spread_stop_request()
            except RuntimeError:  # rank 0 has left, or is no more
                return

    def _spread_stop_request(self) -> None:
        """Tell the other ranks of a signal to this one, or learn of a signal to another."""
        if self._has_told_stop:
            return
        if is_stop_requested():
            self._own_store.set("stop", describe_stop_request())
            self._has_told_stop = True
        elif self._own_store.check(["stop"]):
            self._has_told_stop = True
            request_stop(f"{self._own_store.get('stop').decode()} on another rank")

    def wait_for_all(self, phase: str, beat: Callable[[], object] = lambda: None) -> None:
        """Wait until every rank has called this, as long as those that have not give signs of life.

        See ``core.patient_wait``.
        """
        self._waits += 1
        names = self._rank, self.hosts, f"wait/{self._waits}"
        wait_for_all_ranks(self.store, *names, phase, beat)

    def find_disagreement(self, values: Mapping[str, object], seconds: float) -> str:
        """Return the differences between the ranks' ``values`` as text; called by all ranks.

        Raises:
            LostRankError: a rank died before it came.
        """
        self._topics += 1
        topic = f"same/{self._topics}"
        wait = partial(self.wait_for_all, "compare configurations")  # finds a rank that died
        text = exchange_values(self.store, self._rank, self.hosts, topic, values, seconds, wait)
        if text:  # all end
            confirm_answer_read(self.store, self._rank, self.hosts, f"{topic}/read")
        return text

    @property
    def background_store(self) -> dist.Store:
        """Another connection to ``store``, for threads: a frozen server blocks its caller."""
        return self._own_store

    def close(self) -> None:
        self._stop.set()
        self._thread.join(2.0)  # it may be blocked: a frozen server answers nothing


def join_rendezvous(
    place: LaunchInfo,
    seconds: float,
    token: Mapping[str, str] | None = None,
    device_uuid: str = "",
) -> Rendezvous:
    """Wait for all ranks at the rendezvous address.

    Args:
        token: identifies this run; the same on each of its ranks.
        device_uuid: identifies the accelerator of this rank; empty without one.

    Sets ``GLOO_SOCKET_IFNAME`` to the interface that leads to the other hosts, unless it is set:
    gloo would take the address that the host's own name resolves to, often 127.0.1.1.

    Raises:
        RendezvousError: a rank did not join within ``seconds``, the address is wrong, ranks with
            other tokens joined, or two ranks have one accelerator.
        StopRequested: a signal reached a rank before all had joined.
    """
    end = time.monotonic() + seconds
    if place.address is None:
        address, port = exchange_master_address(place)
    else:
        address, port = place.address, place.port or 0
    where = f"{address}:{port}"
    serves = place.rank == 0 and place.agent is None
    store = _open_rendezvous_store(place, address, port, end, seconds, serves)
    try:
        store.set(f"device/{place.rank}", device_uuid)
        store.set(f"fault/{place.rank}", explain_absent_interface("GLOO_SOCKET_IFNAME"))
        _register_rank(store, place, _find_outgoing_address(address, port), where, token or {})
        if place.rank == 0:
            _wait_for_all_ranks(store, place, where, end, seconds)
        table = _read_verdict(store, place, where, end, seconds)
    except dist.DistError as error:
        raise RendezvousError(
            f"rank {place.rank} on {place.host} lost the connection to {where} while it waited "
            f"for the others: {_first_line_of_error(error)}"
        ) from None
    _choose_interface(place, table, port)
    own_host = cast(dist.TCPStore, store.underlying_store).host if serves else address
    own_store = _open_rendezvous_store(place, own_host, port, end, seconds, False)
    return Rendezvous(place, store, own_store, [host for host, _ in table])


def _open_rendezvous_store(
    place: LaunchInfo, address: str, port: int, end: float, seconds: float, serves: bool
) -> dist.PrefixStore:
    who, where = f"rank {place.rank} on {place.host}", f"{address}:{port}"
    if not serves:
        reason = wait_for_port(address, port, end - time.monotonic())
        if reason is not None:
            raise RendezvousError(
                f"{who} could not reach rank 0 at {where} within {seconds:g} s: {reason}. Either "
                "rank 0 has not started (see its own messages), or MASTER_ADDR is not its host, "
                "or a firewall closes the port"
            )
    host, options = address, dict[str, Any]()
    if serves:
        try:
            is_one_host = place.local_size == place.size
            listening, host = listen_at_address(address, port, is_one_host=is_one_host)
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            fix = f"port {port} is taken there" if taken else error.strerror or str(error)
            raise RendezvousError(
                f"{who} cannot use {where}: {fix}; set MASTER_PORT to a free one"
            ) from None
        options = {"master_listen_fd": listening.detach()}
    try:
        store: dist.Store = dist.TCPStore(
            # rank 0 need not be reachable from its own host under the name that the others use
            host,
            port,
            is_master=serves,
            timeout=timedelta(seconds=max(1.0, end - time.monotonic())),
            wait_for_workers=False,
            **options,
        )
    except dist.DistError as error:
        raise RendezvousError(
            f"{who} cannot use {where}: something else than this run's rank 0 answers there "
            f"({_first_line_of_error(error)})"
        ) from None
    # the restarts of torchrun share one store
    return dist.PrefixStore(f"dist_peft/{place.agent or 0}", store)


def _register_rank(
    store: dist.Store, place: LaunchInfo, leaving: str | None, where: str, token: Mapping[str, str]
) -> None:
    if store.add(f"came/{place.rank}", 1) > 1:
        raise RendezvousError(
            f"rank {place.rank} on {place.host}: another process has come to {where} as rank "
            f"{place.rank} already; two runs use the same address, or a launcher started each "
            "rank twice. Set another MASTER_PORT"
        )
    store.set(f"size/{place.rank}", str(place.size))
    store.set(f"token/{place.rank}", json.dumps(dict(token)))
    store.set(f"rank/{place.rank}", json.dumps([place.host, leaving]))


def _wait_for_all_ranks(
    store: dist.Store, place: LaunchInfo, where: str, end: float, seconds: float
) -> None:
    """Wait, on rank 0, for the others and write the verdict."""
    others = [r for r in range(place.size) if not store.check([f"rank/{r}"])]
    remind = time.monotonic() + REMIND_SECONDS
    while others and time.monotonic() < end and not _is_stop_known(store):
        time.sleep(POLL_SECONDS)
        others = [r for r in others if not store.check([f"rank/{r}"])]
        if others and time.monotonic() > remind:
            log.warning("waiting at %s for %s", where, format_ranks(others))
            remind += REMIND_SECONDS
    verdict: dict[str, Any] = {"error": "", "stop": "", "table": []}
    if others and _is_stop_known(store):
        verdict["stop"] = (
            f"stopped on {store.get('stop').decode()} while {format_ranks(others)} had not come"
        )
    elif others:
        verdict["error"] = _describe_absent_ranks(store, place, others, where, seconds)
    else:
        everyone = range(place.size)
        verdict["table"] = [json.loads(store.get(f"rank/{r}")) for r in everyone]
        sizes = {r: int(store.get(f"size/{r}")) for r in everyone}
        odd = next((r for r in everyone if sizes[r] != place.size), None)
        if odd is not None:
            verdict["error"] = (
                f"rank 0 was started with a world size of {place.size}, rank {odd} on "
                f"{verdict['table'][odd][0]} with {sizes[odd]}"
            )
        else:
            hosts = [entry[0] for entry in verdict["table"]]
            error = _describe_foreign_ranks(store, hosts, where) or _find_fault(store, hosts)
            verdict["error"] = error or _describe_shared_device(store, hosts)
    store.set("verdict", json.dumps(verdict))
    if verdict["error"] or verdict["stop"]:
        _wait_until_verdict_read(store, place.size - len(others) - 1)


def _is_stop_known(store: dist.Store) -> bool:
    """Return whether a signal has reached any rank that has come; tell the others of one to this.

    Later the heartbeats spread it.
    """
    if store.check(["stop"]):
        return True
    if is_stop_requested():
        store.set("stop", describe_stop_request())
        return True
    return False


def _describe_foreign_ranks(store: dist.Store, hosts: Sequence[str], where: str) -> str:
    """Return the message about ranks of several runs; empty where all tokens are equal."""
    groups: dict[bytes, list[int]] = {}
    for rank in range(len(hosts)):
        groups.setdefault(store.get(f"token/{rank}"), []).append(rank)
    if len(groups) == 1:
        return ""
    told = [(ranks, json.loads(token)) for token, ranks in groups.items()]
    return (
        f"ranks of different runs met at {where}: {describe_differences(told, hosts)}. Give each "
        "run a MASTER_PORT of its own, and start all ranks of a run with one command and one "
        "installation"
    )


def _describe_shared_device(store: dist.Store, hosts: Sequence[str]) -> str:
    """Return the message about ranks that have one accelerator; empty where each has its own."""
    groups: dict[bytes, list[int]] = {}
    for rank in range(len(hosts)):
        if uuid := store.get(f"device/{rank}"):
            groups.setdefault(uuid, []).append(rank)
    shared = next((ranks for ranks in groups.values() if len(ranks) > 1), None)
    if shared is None:
        return ""
    return (
        f"{format_ranks(shared)} on {hosts[shared[0]]} have the same CUDA device; start one "
        "process a device, or let the launcher show each process its own (srun --gpus-per-task=1)"
    )


def _find_fault(store: dist.Store, hosts: Sequence[str]) -> str:
    """Return the first fault that a rank has found on its own host; empty if there is none."""
    faults = [store.get(f"fault/{rank}").decode() for rank in range(len(hosts))]
    found = (f"rank {r} on {hosts[r]}: {fault}" for r, fault in enumerate(faults) if fault)
    return next(found, "")


def _describe_absent_ranks(
    store: dist.Store, place: LaunchInfo, missing: Sequence[int], where: str, seconds: float
) -> str:
    """Return the message about missing ranks; names hosts where the launcher lists them."""
    came = [r for r in range(place.size) if r not in set(missing)]
    hosts = {json.loads(store.get(f"rank/{r}"))[0] for r in came}
    empty = [h for h in place.hosts if h not in hosts]
    from_hosts = f"; no rank came from {', '.join(empty)}" if empty else ""
    return (
        f"{format_ranks(missing)} of {place.size} did not come to {where} within {seconds:g} s"
        f"{from_hosts}. {format_ranks(came)} came from {', '.join(sorted(hosts))}. Look for an "
        "earlier error of the missing ranks, check that their hosts reach that address, or raise "
        "engine.start_timeout_minutes"
    )


def _read_verdict(
    store: dist.Store, place: LaunchInfo, where: str, end: float, seconds: float
) -> list[tuple[str, str | None]]:
    end += GRACE_SECONDS  # rank 0 writes its verdict at the very end
    while not store.check(["verdict"]) and time.monotonic() < end:
        _is_stop_known(store)
        time.sleep(POLL_SECONDS)
    if not store.check(["verdict"]):
        missing = [r for r in range(place.size) if not store.check([f"rank/{r}"])]
        raise RendezvousError(_describe_absent_ranks(store, place, missing or [0], where, seconds))
    verdict = json.loads(store.get("verdict"))
    if verdict["error"] or verdict["stop"]:
        if place.rank != 0:
            store.add("told", 1)
        if verdict["stop"]:
            raise StopRequested(verdict["stop"])
        raise RendezvousError(verdict["error"])
    return [(host, address) for host, address in verdict["table"]]


def _wait_until_verdict_read(store: dist.Store, others: int) -> None:
    """Keep the store open until the ranks that joined have read the verdict."""
    end = time.monotonic() + GRACE_SECONDS
    while store.add("told", 0) < others and time.monotonic() < end:
        time.sleep(POLL_SECONDS)
    time.sleep(POLL_SECONDS)


def _find_outgoing_address(address: str, port: int) -> str | None:
    with contextlib.suppress(OSError):
        return find_local_address_towards(address, port)
    return None


def _choose_interface(
    place: LaunchInfo, table: Sequence[tuple[str, str | None]], port: int
) -> None:
    """Point gloo at the interface that leads to the other hosts."""
    if "GLOO_SOCKET_IFNAME" in os.environ or len(set(table)) == 1:
        return
    mine = table[place.rank][1]
    if mine is None or is_loopback(mine):  # rank 0's own name leads to loopback on its host
        far = [a for _, a in table if a is not None and not is_loopback(a)]
        mine = _find_outgoing_address(far[0], port) if far else None
    name = find_interface(mine) if mine is not None else None
    if name is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = name


def _first_line_of_error(error: Exception) -> str:
    return str(error).partition("\n")[0]
