"""Wait for ranks that download or tokenize: without a limit of time, while they give signs of life.

A collective ends after its time limit and does not know whether the ranks that it waits for are
alive. Here a rank counts its arrival in the store of the rendezvous and looks now and then whether
all have come. Rank 0 alone watches the heartbeats (``core.rendezvous``) of those that have not: N
ranks make 2 N + 1 calls to come, 2 a second and rank while they wait, and rank 0 two for each rank
that is missing every ``LOOK_SECONDS``.
"""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from dist_peft.core.agreement import KeyValueStore, format_ranks

__all__ = ["LostRankError", "confirm_answer_read", "wait_for_all_ranks"]

log = logging.getLogger("dist_peft")

WATCH_SECONDS = 20.0
"""A rank without a heartbeat for so long has died; also the time between two lines of the log."""

LOOK_SECONDS = 2.0
"""Between two looks of rank 0 at the heartbeats, which come as often."""

LONGEST_PAUSE = 0.5
"""Between two looks at the store while a rank waits for others, in seconds."""


class LostRankError(RuntimeError):
    """Another rank has died; the message names it."""


def wait_for_all_ranks(
    store: KeyValueStore,
    rank: int,
    hosts: Sequence[str],
    topic: str,
    phase: str,
    beat: Callable[[], object] = lambda: None,
) -> None:
    """Wait until every rank has called this with the same ``topic``.

    Args:
        store: shared by all ranks, with their heartbeats under ``pulse/RANK``.
        rank: of this process.
        hosts: the host of each rank.
        topic: prefix of the keys in the store, not used before.
        phase: the activity of the others, for the log.
        beat: called between two looks at the store, every ``LONGEST_PAUSE`` seconds or more often.

    Raises:
        LostRankError: a rank died before it came.
        torch.distributed.DistError: rank 0 did.
    """
    store.set(f"{topic}/{rank}", "")
    if store.add(f"{topic}/count", 1) == len(hosts):
        store.set(f"{topic}/end", "")
    watch = _AbsenceWatch(store, topic, hosts) if rank == 0 else None
    pause = 0.002
    while not store.check([f"{topic}/end"]):
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)
        beat()
        if watch is not None:
            watch.look_for_dead_ranks(phase)
    if lost := store.get(f"{topic}/end").decode():
        raise LostRankError(f"{lost} died during the phase {phase!r}: no sign of life")


def confirm_answer_read(store: KeyValueStore, rank: int, hosts: Sequence[str], topic: str) -> None:
    """Tell rank 0 that this rank has read an answer after which all end; rank 0 waits for it.

    Rank 0 may serve the store. If it ended first, a rank that is slow would find a broken
    connection in the place of the answer. Ranks that have died are not waited for.

    Args:
        topic: prefix of the keys in the store, not used before.
    """
    if rank != 0:
        with suppress(RuntimeError):  # the store is gone, and the answer is here
            store.set(f"{topic}/{rank}", "")
        return
    watch = _AbsenceWatch(store, topic, hosts)
    readers = [f"{topic}/{r}" for r in range(1, len(hosts))]
    pause = 0.002
    while not store.check(readers) and not store.check([f"{topic}/end"]):
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)
        watch.look_for_dead_ranks("read the answer")


class _AbsenceWatch:
    """Rank 0's view of the ranks that have not come yet."""

    def __init__(self, store: KeyValueStore, topic: str, hosts: Sequence[str]) -> None:
        self._store, self._topic, self._hosts = store, topic, hosts
        self._absent = list(range(1, len(hosts)))
        self._pulses: dict[int, tuple[int, float]] = {}
        """The last heartbeat of each, and when it was first seen."""
        self._last = time.monotonic()
        self._clock = 0.0
        """Seconds that this process was not stopped: a run suspended as a whole continues."""
        self._told = 0.0

    def look_for_dead_ranks(self, phase: str) -> None:
        """End the wait of all for a rank that died; log now and then who is missing."""
        now = time.monotonic()
        if now - self._last < LOOK_SECONDS:
            return
        self._clock += min(now - self._last, 2 * LOOK_SECONDS)
        self._last = now
        self._absent = [r for r in self._absent if not self._store.check([f"{self._topic}/{r}"])]
        for rank in self._absent:
            pulse = self._store.add(f"pulse/{rank}", 0)
            if self._pulses.get(rank, (None, 0.0))[0] != pulse:
                self._pulses[rank] = pulse, self._clock
        dead = [r for r in self._absent if self._clock - self._pulses[r][1] >= WATCH_SECONDS]
        if dead:
            names = ", ".join(f"rank {r} on {self._hosts[r]}" for r in dead)
            self._store.set(f"{self._topic}/end", names)
        elif self._absent and self._clock - self._told >= WATCH_SECONDS:
            self._told = self._clock
            ranks = format_ranks(self._absent)
            log.info("%s: waiting for %s since %.0f s", phase, ranks, self._clock)
