"""Who stands still, and whom the others wait for: messages and a clock, no threads."""

import math
import re
from dataclasses import replace

import pytest

from dist_peft.core.progress_beat import BeatState
from dist_peft.core.stall_judge import (
    CONNECT_SECONDS,
    RankBeat,
    StallJudge,
    Verdict,
    limit_silence,
)

HOSTS = ["a", "a", "b"]
READING = BeatState(7, 3, "read data", 1.0)
COMPUTING = BeatState(8, 3, "forward and backward", 1.0)


def beat(number: int, state: BeatState = COMPUTING, age: float = 0.0, **more: object) -> str:
    limit = 10.0 * state.patience
    return RankBeat(number, state, age, limit, **more).to_json()  # type: ignore[arg-type]


def without_times(text: str) -> str:
    return re.sub(r" \(since [^)]*\)", "", text)


def judge_at(clock: float, *messages: str, hosts: list[str] = HOSTS) -> Verdict:
    """The verdict at ``clock`` about messages that all came at 0."""
    judge = StallJudge(hosts, 10.0)
    judge.judge_beats(0.0, messages)
    alive = [replace(RankBeat.from_json(m), number=100, age=clock) for m in messages]
    return judge.judge_beats(clock, [each.to_json() for each in alive])


def test_messages_survive_json() -> None:
    sent = RankBeat(3, READING, 1.5, math.inf, failure="out of memory")
    assert RankBeat.from_json(sent.to_json().encode()) == sent
    verdict = Verdict(2, "a", [1], "b", "c", "d", True)
    assert Verdict.from_json(verdict.to_json()) == verdict


def test_the_rank_that_is_behind_is_named() -> None:
    messages = (beat(1), beat(1, READING), beat(1))
    assert judge_at(9.0, *messages).alarm == ""
    assert without_times(judge_at(11.0, *messages).alarm) == (
        "rank 1 on a has stood still for 11 s, in 'read data' of step 3; the other ranks wait for "
        "it"
    )


def test_silence_is_short_while_ranks_connect() -> None:
    connecting = replace(COMPUTING, waits=True, connects=True)
    limit = 10 * CONNECT_SECONDS  # of a run
    for state, expected in ((connecting, CONNECT_SECONDS), (COMPUTING, limit)):
        judge = StallJudge(HOSTS, limit)
        judge.judge_beats(0.0, [beat(1, state)] * 3)

        def judge_alive(clock: float, judge: StallJudge = judge, state: BeatState = state) -> str:
            alive = [beat(2 + int(clock), state)] * 2
            return judge.judge_beats(clock, [alive[0], beat(1, state), alive[1]]).alarm

        assert judge_alive(expected - 1.5) == ""
        text = without_times(judge_alive(expected + 0.5))
        assert text.startswith("rank 1 on a has given no sign of life for 2")


def test_a_short_limit_of_the_run_stays_while_ranks_connect() -> None:
    assert limit_silence(3.0, connects=True) == 3.0
    assert limit_silence(300.0, connects=True) == CONNECT_SECONDS
    assert limit_silence(300.0, connects=False) == 300.0


def test_a_rank_that_waits_is_not_the_one() -> None:
    waiting = replace(READING, waits=True)
    alarm = judge_at(11.0, beat(1, waiting), beat(1, waiting), beat(1)).alarm
    assert without_times(alarm).startswith("rank 2 on b has stood still for 11 s, in 'forward")


def test_ranks_that_all_wait_are_all_named() -> None:
    alarm = judge_at(11.0, *[beat(1, replace(READING, waits=True))] * 3).alarm
    assert without_times(alarm).startswith(
        "rank 0 on a, rank 1 on a, rank 2 on b have stood still for 11 s, in 'read data', waiting"
    )
    six = judge_at(11.0, *[beat(1)] * 6, hosts=["a"] * 6).alarm
    assert "rank 3 on a and 2 more have stood still" in six


@pytest.mark.parametrize("patience", [6.0, math.inf])
def test_a_rank_in_a_long_phase_keeps_the_others_waiting(patience: float) -> None:
    writing = replace(READING, phase="checkpoint", patience=patience)
    messages = (beat(1, writing), beat(1), beat(1))
    assert judge_at(59.0, *messages).alarm == ""
    late = judge_at(61.0, *messages).alarm
    assert ("rank 0 on a has stood still" in late) == (patience == 6.0)


def test_a_silent_rank_is_named_at_once_in_any_phase() -> None:
    judge = StallJudge(HOSTS, 10.0)
    long = replace(READING, phase="download", patience=math.inf)
    for clock in range(0, 12, 2):
        numbers = (clock, clock, 1)
        found = judge.judge_beats(clock, [beat(n, long) for n in numbers])
        assert found.silent == ([2] if clock >= 6 else [])
        assert bool(found.alarm) == (clock >= 10)
    assert without_times(found.alarm) == (
        "rank 2 on b has given no sign of life for 10 s, last in 'download' of step 3: it is "
        "frozen or dead, or the network to it is cut"
    )


def test_a_rank_that_never_sent_anything_is_silent() -> None:
    judge = StallJudge(HOSTS, 10.0)
    for clock in range(0, 12, 2):
        found = judge.judge_beats(clock, [beat(clock), None, beat(clock)])
    assert "rank 1 on a has given no sign of life" in found.alarm


def test_ranks_that_have_left_are_not_judged() -> None:
    judge = StallJudge(HOSTS, 10.0)
    gone = beat(1, has_left=True)
    for clock in range(0, 32, 2):
        found = judge.judge_beats(clock, [beat(clock), gone, gone])
    assert (found.alarm, found.silent) == ("", [])


def test_a_failure_is_passed_on() -> None:
    found = judge_at(1.0, beat(1), beat(1, failure="out of GPU memory"), beat(1))
    assert found.failures == "rank 1 on a failed: out of GPU memory" and not found.alarm


def test_standing_is_known_before_the_alarm_and_without_a_limit() -> None:
    assert judge_at(5.0, beat(1), beat(1, READING), beat(1)).standing == ""
    assert "rank 1 on a has stood" in judge_at(7.0, beat(1), beat(1, READING), beat(1)).standing
    unlimited = StallJudge(HOSTS, 0.0)
    for clock in (0, 50, 100):
        found = unlimited.judge_beats(clock, [beat(1, READING)] * 3)
    assert found.alarm == "" and found.silent == [0, 1, 2]
