"""Judge the progress beats of all ranks: who stands still, and whom do the others wait for.

One rank judges for all, so that N ranks make 2 N calls to the store for each look and not N * N,
and every survivor prints the same line. The run has stalled when

- a rank has sent nothing for ``stall_seconds`` (``CONNECT_SECONDS``, if that is less, while another
  makes a process group): its process is frozen or dead, or the network to it is cut; or
- every rank has stood still for longer than its phase allows. As long as one rank gets on, the
  others may be waiting for it: ranks that evaluate, write or solve alone raise no false alarm.

Times are ages on the clock of the rank that measures them, never differences between hosts.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta

from dist_peft.core.progress_beat import BeatState

__all__ = [
    "CONNECT_SECONDS",
    "QUIET_SECONDS",
    "RankBeat",
    "StallJudge",
    "Verdict",
    "describe_silence",
    "describe_standing",
    "limit_silence",
]

QUIET_SECONDS = 6.0
"""A rank that has sent nothing for so long is named when a collective fails."""

CONNECT_SECONDS = 20.0
"""The longest silence of a rank while others connect to it, which gloo does without noticing that
it has died; as long as for ranks that are waited for without a collective."""

_MOST_NAMED = 4
"""Ranks that one line names."""


@dataclass(frozen=True)
class RankBeat:
    """The message of a rank.

    Attributes:
        number: of the message: a message that is sent again is a sign of life.
        state: of its main thread.
        age: seconds since its main thread got on.
        limit: the longest age that its phase allows; infinity for one without a limit.
        has_left: whether it has ended well.
        failure: why it failed; empty while it runs.
    """

    number: int
    state: BeatState
    age: float
    limit: float
    has_left: bool = False
    failure: str = ""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: bytes | str) -> "RankBeat":
        tree = json.loads(text)
        return cls(**{**tree, "state": BeatState(**tree["state"])})


@dataclass(frozen=True)
class Verdict:
    """The message of the judge.

    Attributes:
        number: of the verdict.
        alarm: one line of text when the run has stalled.
        silent: ranks that have sent nothing for ``QUIET_SECONDS``.
        failures: why ranks failed, as text; empty if none did.
        standing: the rank that the others wait for, as text; empty where none is behind the others.
        judge: the activity of the judge itself, for ranks that do not hear from it again.
        judge_has_left: whether it has ended well.
    """

    number: int = 0
    alarm: str = ""
    silent: list[int] = field(default_factory=list)
    failures: str = ""
    standing: str = ""
    judge: str = ""
    judge_has_left: bool = False

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: bytes | str) -> "Verdict":
        return cls(**json.loads(text))


_NO_BEAT = RankBeat(0, BeatState(), 0.0, math.inf)


@dataclass
class _RankView:
    """The last message of a rank, and when it came."""

    beat: RankBeat
    arrived: float

    def get_age(self, clock: float) -> float:
        return self.beat.age + clock - self.arrived


class StallJudge:
    """Keeps the last message of each rank."""

    def __init__(self, hosts: Sequence[str], stall_seconds: float) -> None:
        """Take the host of each rank; 0 seconds: no alarm."""
        self._hosts = hosts
        self._stall_seconds = stall_seconds
        self._views: dict[int, _RankView] = {}
        self._number = 0

    def judge_beats(self, clock: float, messages: Sequence[bytes | str | None]) -> Verdict:
        """Judge the messages of all ranks, in their order; the first rank is the judge's.

        Args:
            clock: seconds on a clock that stands still while this process does.
            messages: None for a rank that has sent none yet.
        """
        for rank, text in enumerate(messages):
            beat = _NO_BEAT if text is None else RankBeat.from_json(text)
            view = self._views.get(rank)
            if view is None or view.beat.number != beat.number:
                self._views[rank] = _RankView(beat, clock)
        running = {r: v for r, v in self._views.items() if not v.beat.has_left}
        silence = {r: clock - v.arrived for r, v in running.items() if not v.beat.failure}
        self._number += 1
        behind = self._find_behind(running)
        still = bool(behind) and all(running[r].get_age(clock) >= QUIET_SECONDS for r in behind)
        named = self._find_stalled(running, silence, behind, clock)
        failed = {r: v.beat.failure for r, v in running.items() if v.beat.failure}
        return Verdict(
            self._number,
            alarm=self._describe_alarm(named, silence, running, clock),
            silent=[r for r, seconds in silence.items() if seconds >= QUIET_SECONDS],
            failures="; ".join(f"{self._name(r)} failed: {text}" for r, text in failed.items()),
            standing=self._describe_standing(behind, running, clock) if still else "",
            judge=self._views[0].beat.state.describe(),
        )

    def _find_stalled(
        self,
        running: dict[int, _RankView],
        silence: dict[int, float],
        behind: list[int],
        clock: float,
    ) -> list[int]:
        """Return the ranks to blame for a stall; empty if there is none."""
        if not self._stall_seconds:
            return []
        limit = self._limit_silence(running)
        if silent := [r for r, seconds in silence.items() if seconds >= limit]:
            return silent
        if all(v.get_age(clock) > v.beat.limit for v in running.values()):
            return behind or list(running)
        return []

    def _limit_silence(self, running: dict[int, _RankView]) -> float:
        connects = any(view.beat.state.connects for view in running.values())
        return limit_silence(self._stall_seconds, connects=connects)

    def _find_behind(self, running: dict[int, _RankView]) -> list[int]:
        """Return the ranks that the others wait for; empty where none is behind the others."""
        at_work = {r: v.beat.state.turn for r, v in running.items() if not v.beat.state.waits}
        behind = [r for r, turn in at_work.items() if turn == min(at_work.values())]
        return behind if len(behind) < len(running) else []

    def _describe_alarm(
        self,
        named: list[int],
        silence: dict[int, float],
        running: dict[int, _RankView],
        clock: float,
    ) -> str:
        if not named:
            return ""
        first = named[0]
        if silence.get(first, 0.0) < self._limit_silence(running):
            return self._describe_standing(named, running, clock)
        state = running[first].beat.state
        return describe_silence(self._name(*named), silence[first], state.describe())

    def _describe_standing(
        self, ranks: list[int], running: dict[int, _RankView], clock: float
    ) -> str:
        first = running[ranks[0]]
        doing = first.beat.state.describe()
        text = describe_standing(self._name(*ranks), first.get_age(clock), doing, len(ranks))
        if len(ranks) == len(running):
            return f"{text}: no rank gets on; they wait for each other in a collective"
        return f"{text}; the other ranks wait for {'it' if len(ranks) == 1 else 'them'}"

    def _name(self, *ranks: int) -> str:
        names = ", ".join(f"rank {r} on {self._hosts[r]}" for r in ranks[:_MOST_NAMED])
        more = len(ranks) - _MOST_NAMED
        return f"{names} and {more} more" if more > 0 else names


def limit_silence(stall_seconds: float, *, connects: bool) -> float:
    """Return the longest silence of a rank, in seconds; ``connects``: others connect to it."""
    return min(stall_seconds, CONNECT_SECONDS) if connects else stall_seconds


def describe_silence(who: str, seconds: float, doing: str) -> str:
    """Return the line about a rank that has sent nothing for ``seconds``."""
    sign = _describe_time("given no sign of life", seconds)
    return f"{who} has {sign}, last {doing}: it is frozen or dead, or the network to it is cut"


def describe_standing(who: str, seconds: float, doing: str, count: int = 1) -> str:
    """Return the line about ``count`` ranks that have stood still for ``seconds``."""
    still = _describe_time("stood still", seconds)
    return f"{who} {'has' if count == 1 else 'have'} {still}, {doing}"


def _describe_time(state: str, seconds: float) -> str:
    since = datetime.now() - timedelta(seconds=seconds)
    return f"{state} for {seconds:.0f} s (since {since:%Y-%m-%d %H:%M:%S})"
