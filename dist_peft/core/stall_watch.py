"""Threads that notice when a rank stands still, whatever the main threads are blocked in.

Each rank has two. One exchanges beats through a connection to the rendezvous' store that the main
thread never uses; it may block for ever, since a frozen server answers nothing and its sockets have
no time limit. The other never touches a socket: it looks at the beat of the main thread and at the
last message that the first one received, so that it always ends. Rank 0 judges for all
(``core.stall_judge``).

::

    rank r   beat/r  ->  store  ->  rank 0: all beats, one verdict  ->  store  ->  rank r

A rank that hears no new verdict for ``stall_seconds`` takes rank 0, or the way to it, for frozen
and raises the alarm itself. One whose store is gone (rank 0 has ended) watches its own main thread.

Time is counted by a clock that stands still while this process does: a laptop that was suspended,
or a run stopped with Ctrl-Z, continues.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from dist_peft.core.progress_beat import read_beat, reset_beat
from dist_peft.core.stall_judge import (
    QUIET_SECONDS,
    RankBeat,
    StallJudge,
    Verdict,
    describe_silence,
    describe_standing,
    limit_silence,
)

__all__ = ["BeatStore", "StallReport", "StallWatch"]

TICK_SECONDS = 2.0
"""The longest time between two looks."""

READ_SECONDS = 5.0
"""The longest wait of rank 0, whose end closes the store, until the others have read an alarm."""

_VERDICT = "beat/verdict"
_READ = "beat/read"


class BeatStore(Protocol):
    """The part of ``torch.distributed.Store`` that is used."""

    def set(self, key: str, value: str, /) -> None: ...

    def multi_get(self, keys: list[str], /) -> list[bytes]: ...

    def check(self, keys: list[str], /) -> bool: ...

    def add(self, key: str, amount: int, /) -> int: ...


@dataclass(frozen=True)
class StallReport:
    """An alarm.

    Attributes:
        text: one line that names rank, host, phase and since when.
        first_is_silent: whether rank 0, which writes the log of a run, is no longer able to.
        wait_until_read: waits, on rank 0, a few seconds until the others know; to be called before
            the process ends.
    """

    text: str
    first_is_silent: bool
    wait_until_read: Callable[[], None]


class StallWatch:
    """Watches this rank and the others until ``close``."""

    def __init__(
        self,
        rank: int,
        hosts: Sequence[str],
        store: BeatStore | None,
        stall_seconds: float = 0.0,
        on_stall: Callable[[StallReport], None] | None = None,
    ) -> None:
        """Start the threads.

        Args:
            hosts: the host of each rank.
            store: shared by all ranks, not used by this rank's main thread; None: one process.
            stall_seconds: 0: only exchange beats, for ``explain_silence``.
            on_stall: called once, from a thread; ends the process.
        """
        reset_beat()
        self._rank, self._hosts, self._store = rank, hosts, store
        self._stall_seconds = stall_seconds if on_stall is not None else 0.0
        self._on_stall = on_stall
        self._tick = min(TICK_SECONDS, self._stall_seconds / 10 or TICK_SECONDS)
        self._judge = StallJudge(hosts, self._stall_seconds)
        self._stop = threading.Event()
        self._hurry = threading.Event()
        self._clock = self._own_since = self._heard_since = 0.0
        self._own_beat = read_beat()
        self._number = 0
        self._verdict = Verdict()
        self._all_came = self._has_confirmed = False
        self._readers = 0
        self._lost: str | None = None
        """Why the store does not answer any more: rank 0 has ended, well or not."""
        self._failure = ""
        self._threads = [threading.Thread(target=self._watch, daemon=True, name="stall watch")]
        if store is not None:
            exchange = threading.Thread(target=self._exchange, daemon=True, name="beat exchange")
            self._threads.append(exchange)
        for thread in self._threads:
            thread.start()

    def close(self, failure: str = "") -> None:
        """End the threads, quietly; tell the other ranks that this one has left, or why it fails.

        Takes two seconds at most, also where the store is frozen.
        """
        self._failure = failure
        self._stop.set()
        self._hurry.set()
        for thread in self._threads:
            thread.join(2.0)

    def explain_silence(self) -> tuple[str, str]:
        """Find out which rank made a collective fail.

        Waits up to some seconds: a rank that died is known by its silence.

        Returns:
            The ranks without a sign of life, as text; and further knowledge: that another rank has
            failed, or stands still and lets the others wait. Either may be empty.
        """
        silent, other = "", ""
        end = time.monotonic() + QUIET_SECONDS + 2 * self._tick + 1.0
        while not (silent or other) and time.monotonic() < end:
            silent, other = self._name_silent_ranks(), self._verdict.failures
            time.sleep(0.1)
        if self._rank == 0 and (silent or other):
            time.sleep(1.5 * self._tick)  # the others learn it from this rank's store
        return silent, other or ("" if silent else self._verdict.standing)

    def _name_silent_ranks(self) -> str:
        silent = self._verdict.silent
        if self._rank != 0 and not self._verdict.judge_has_left:
            waited = self._clock - self._heard_since
            silent = [0] if self._lost is not None or waited >= QUIET_SECONDS else silent
        return ", ".join(f"rank {r} on {self._hosts[r]}" for r in silent if r != self._rank)

    # -- the thread that never blocks ----------------------------------------------------------

    def _watch(self) -> None:
        last, verdict = time.monotonic(), self._verdict
        while not self._stop.wait(self._tick):
            now = time.monotonic()
            self._clock += min(now - last, 2 * self._tick)
            last = now
            beat = read_beat()
            if beat != self._own_beat:
                self._own_beat, self._own_since = beat, self._clock
            if self._verdict is not verdict:
                verdict, self._heard_since = self._verdict, self._clock
            report = self._find_alarm(verdict) if self._stall_seconds else None
            if report is not None and self._on_stall is not None:
                self._on_stall(report)
                return

    def _find_alarm(self, verdict: Verdict) -> StallReport | None:
        if verdict.alarm:
            return StallReport(verdict.alarm, False, self._wait_until_read)
        if self._store is None or self._lost is not None or verdict.judge_has_left:
            text = self._find_own_stall(verdict.judge_has_left)
            return StallReport(text, self._rank != 0, _do_nothing) if text else None
        waited = self._clock - self._heard_since
        connects = self._own_beat[0].connects
        if waited < limit_silence(self._stall_seconds, connects=connects):
            return None
        who = f"rank 0 on {self._hosts[0]}" if self._rank else "the launcher's agent"
        doing = verdict.judge or "before the first beat"
        text = describe_silence(f"{who}, which connects the ranks,", waited, doing)
        return StallReport(text, self._rank != 0, _do_nothing)

    def _find_own_stall(self, judge_has_left: bool) -> str:
        """Return the line about this rank where there is no judge any more."""
        beat = self._make_beat()
        limit = beat.limit
        if beat.state.connects and not judge_has_left:  # to rank 0, among others
            limit = limit_silence(limit, connects=True)
        if beat.age <= limit:
            return ""
        who = f"rank {self._rank} on {self._hosts[self._rank]}"
        text = describe_standing(who, beat.age, beat.state.describe())
        if self._store is None or judge_has_left:
            return text
        return f"{text}; rank 0 on {self._hosts[0]}, which connects the ranks, is gone"

    def _make_beat(self) -> RankBeat:
        self._number += 1
        state, age = self._own_beat[0], self._clock - self._own_since
        limit = state.patience * self._stall_seconds
        left = self._stop.is_set() and not self._failure
        return RankBeat(self._number, state, age, limit, left, self._failure)

    def _wait_until_read(self) -> None:
        others = len(self._hosts) - 1 - len(self._verdict.silent)
        end = time.monotonic() + READ_SECONDS
        while self._rank == 0 and self._readers < others and time.monotonic() < end:
            time.sleep(0.05)

    # -- the thread that may block -------------------------------------------------------------

    def _exchange(self) -> None:
        assert self._store is not None
        try:
            while not self._stop.is_set():
                self._exchange_once(self._store)
                self._hurry.wait(self._tick)
            self._exchange_once(self._store)
        except RuntimeError as error:  # torch.distributed.DistError: rank 0 has left, or is no more
            self._lost = str(error).partition("\n")[0]

    def _exchange_once(self, store: BeatStore) -> None:
        store.set(f"beat/{self._rank}", self._make_beat().to_json())
        if self._rank != 0:
            if store.check([_VERDICT]):  # else "get" would block other users of the connection
                (text,) = store.multi_get([_VERDICT])
                found = Verdict.from_json(text)
                if found.number != self._verdict.number:
                    self._verdict = found
            if self._verdict.alarm and not self._has_confirmed:
                self._has_confirmed = True
                store.add(_READ, 1)
            return
        keys = [f"beat/{rank}" for rank in range(len(self._hosts))]
        if self._stop.is_set():
            failure = f"rank 0 on {self._hosts[0]} failed: {self._failure}" if self._failure else ""
            number, has_left = self._verdict.number + 1, not failure
            last = replace(self._verdict, number=number, failures=failure, judge_has_left=has_left)
            store.set(_VERDICT, last.to_json())
        elif not self._verdict.alarm:
            self._all_came = self._all_came or store.check(keys)
            came = keys if self._all_came else [key for key in keys if store.check([key])]
            messages = dict(zip(came, store.multi_get(came), strict=True))
            self._verdict = self._judge.judge_beats(
                self._clock, [messages.get(key) for key in keys]
            )
            store.set(_VERDICT, self._verdict.to_json())
        else:
            self._readers = store.add(_READ, 0)


def _do_nothing() -> None:
    pass
