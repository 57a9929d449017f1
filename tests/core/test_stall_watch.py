"""The two threads of a rank, with a store in memory: ranks are threads of one process here."""

import threading
import time
from collections.abc import Callable, Iterator
from unittest import mock

import pytest

from dist_peft.core import progress_beat, stall_watch
from dist_peft.core.stall_watch import StallReport, StallWatch

HOSTS = ["a", "b"]


class MemoryStore:
    """A store that counts its calls, and may be frozen or gone."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self.counts: dict[str, int] = {}
        self.calls = 0
        self.frozen = threading.Event()
        self.is_gone = False

    def _call(self) -> None:
        self.calls += 1
        if self.is_gone:
            raise RuntimeError("Connection reset by peer\nmore")
        if self.frozen.is_set():
            time.sleep(600)

    def set(self, key: str, value: str, /) -> None:
        self._call()
        self.values[key] = value

    def multi_get(self, keys: list[str], /) -> list[bytes]:
        self._call()
        return [self.values[key].encode() for key in keys]

    def check(self, keys: list[str], /) -> bool:
        self._call()
        return all(key in self.values for key in keys)

    def add(self, key: str, amount: int, /) -> int:
        self._call()
        self.counts[key] = self.counts.get(key, 0) + amount
        return self.counts[key]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(stall_watch, "TICK_SECONDS", 0.02)
    monkeypatch.setattr(stall_watch, "QUIET_SECONDS", 0.3)
    monkeypatch.setattr("dist_peft.core.stall_judge.QUIET_SECONDS", 0.3)
    yield
    progress_beat.reset_beat()


@pytest.fixture
def in_a_step() -> Callable[[], None]:
    """Begin the second step, in which there is no more patience than usual."""

    def begin() -> None:
        for step in (1, 2):
            progress_beat.start_step_phase(step, "read data")

    return begin


def wait_for(found: list[StallReport], count: int = 1) -> list[StallReport]:
    end = time.monotonic() + 20
    while len(found) < count and time.monotonic() < end:
        time.sleep(0.01)
    return found


def test_one_process_watches_its_main_thread(in_a_step: Callable[[], None]) -> None:
    found: list[StallReport] = []
    watch = StallWatch(0, ["a"], None, 0.5, found.append)
    in_a_step()
    for _ in range(5):
        time.sleep(0.2)
        progress_beat.mark_progress()
    assert not found
    (report,) = wait_for(found)
    assert report.text.startswith("rank 0 on a has stood still for ")
    assert report.text.endswith("in 'read data' of step 2")
    watch.close()


def test_a_frozen_store_is_noticed_and_left(in_a_step: Callable[[], None]) -> None:
    store, found = MemoryStore(), list[StallReport]()
    watches = [StallWatch(r, HOSTS, store, 0.6, found.append) for r in range(2)]
    in_a_step()
    time.sleep(0.3)
    store.frozen.set()
    start = time.monotonic()
    silent, _ = watches[1].explain_silence()
    assert silent == "rank 0 on a" and time.monotonic() - start < 20
    texts = sorted(report.text for report in wait_for(found, 2))
    assert texts[0].startswith("rank 0 on a, which connects the ranks, has given no sign of life")
    assert texts[1].startswith("the launcher's agent, which connects the ranks, has given no sign")
    assert "last in 'read data' of step 2" in texts[0]
    start = time.monotonic()
    watches[1].close()
    assert time.monotonic() - start < 20


def test_all_survivors_say_the_same_and_rank_0_waits_for_them(
    in_a_step: Callable[[], None],
) -> None:
    store, found = MemoryStore(), list[StallReport]()
    watches = [StallWatch(r, HOSTS, store, 0.4, found.append) for r in range(2)]
    in_a_step()
    reports = wait_for(found, 2)
    assert len({report.text for report in reports}) == 1
    assert not any(report.first_is_silent for report in reports)
    start = time.monotonic()
    for report in reports:
        report.wait_until_read()
    assert time.monotonic() - start < 0.9 * stall_watch.READ_SECONDS
    for watch in watches:
        watch.close()


def test_rank_0_that_has_left_or_is_gone_is_told_apart(in_a_step: Callable[[], None]) -> None:
    for ends_well in (True, False):
        store, found = MemoryStore(), list[StallReport]()
        first = StallWatch(0, HOSTS, store, 0.5, lambda report: None)
        second = StallWatch(1, HOSTS, store, 0.5, found.append)
        time.sleep(0.3)
        in_a_step()
        if ends_well:
            first.close()
            time.sleep(0.2)
        store.is_gone = True
        (report,) = wait_for(found)
        assert report.text.startswith("rank 1 on b has stood still for ")
        assert ("rank 0 on a, which connects the ranks, is gone" in report.text) != ends_well
        for watch in (first, second):
            watch.close()


def test_a_failure_reaches_the_others() -> None:
    store = MemoryStore()
    for failing in (1, 0):
        watches = [StallWatch(r, HOSTS, store) for r in range(2)]
        time.sleep(0.2)
        watches[failing].close("out of GPU memory")
        _, other = watches[1 - failing].explain_silence()
        assert other == f"rank {failing} on {HOSTS[failing]} failed: out of GPU memory"
        watches[1 - failing].close()
        store.values.clear()


def test_nothing_is_explained_where_all_live() -> None:
    store = MemoryStore()
    watches = [StallWatch(r, HOSTS, store) for r in range(2)]
    assert watches[1].explain_silence() == ("", "")
    for watch in watches:
        watch.close()


def test_time_in_which_this_process_stood_still_does_not_count(
    in_a_step: Callable[[], None],
) -> None:
    """A suspended laptop: the clock jumps by an hour between two looks."""
    found: list[StallReport] = []
    jumps = iter([0.0] * 5)
    real = time.monotonic
    shift = [0.0]

    def jump() -> float:
        if next(jumps, None) is None and not shift[0]:
            shift[0] = 3600.0
        return real() + shift[0]

    with mock.patch.object(stall_watch.time, "monotonic", jump):
        watch = StallWatch(0, ["a"], None, 2.0, found.append)
        in_a_step()
        time.sleep(0.8)
        assert shift[0] and not found
        watch.close()


def test_calls_grow_with_the_ranks_and_not_with_their_square() -> None:
    """512 ranks make 2 calls each and rank 0 one more for all, at each look."""
    calls = {}
    for size in (64, 512):
        store, hosts = MemoryStore(), ["a"] * size
        with mock.patch.object(stall_watch.threading.Thread, "start"):
            watches = [StallWatch(rank, hosts, store) for rank in range(size)]
        for _ in range(2):  # every rank's first message, then the usual look
            store.calls = 0
            for watch in reversed(watches):
                watch._exchange_once(store)
        calls[size] = store.calls
    assert calls == {64: 63 * 3 + 3, 512: 511 * 3 + 3}
