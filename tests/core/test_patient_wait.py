"""Ranks (threads here) wait for a slow one, and end when it has died."""

import threading
import time
from collections.abc import Sequence

import pytest
import torch.distributed as dist

from dist_peft.core import patient_wait
from dist_peft.core.patient_wait import LostRankError, confirm_answer_read, wait_for_all_ranks
from dist_peft.core.world import World

HOSTS = ("node1", "node1", "node2")


def wait_in_threads(
    store: dist.Store, delays: Sequence[float | None], beats: list[int]
) -> list[str]:
    """Call it on each rank after its delay (None: never); give each rank's error, empty if none."""
    results = ["never came"] * len(delays)

    def come(rank: int, delay: float) -> None:
        time.sleep(delay)
        try:
            wait_for_all_ranks(store, rank, HOSTS, "w", "read", lambda: beats.append(rank))
            results[rank] = ""
        except RuntimeError as error:
            results[rank] = str(error)

    threads = [
        threading.Thread(target=come, args=(rank, delay))
        for rank, delay in enumerate(delays)
        if delay is not None
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return results


@pytest.mark.parametrize("delays", [(0, 0, 0.4), (0.4, 0, 0)])
def test_all_wait_for_the_last(delays: Sequence[float]) -> None:
    beats: list[int] = []
    assert wait_in_threads(dist.HashStore(), delays, beats) == ["", "", ""]
    assert len(set(beats)) == 2  # those who waited


def test_rank_that_died_is_named_to_all(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(patient_wait, "WATCH_SECONDS", 0.3)
    monkeypatch.setattr(patient_wait, "LOOK_SECONDS", 0.1)
    monkeypatch.setattr(patient_wait, "LONGEST_PAUSE", 0.1)
    store = dist.HashStore()
    lives = threading.Event()

    def beat_for_a_while() -> None:
        while not lives.wait(0.05):
            store.add("pulse/2", 1)

    thread = threading.Thread(target=beat_for_a_while)
    thread.start()
    threading.Timer(1.2, lives.set).start()
    start = time.monotonic()
    with caplog.at_level("INFO", "dist_peft"):
        results = wait_in_threads(store, (0, 0, None), [])
    assert time.monotonic() - start > 1.2
    message = "rank 2 on node2 died during the phase 'read': no sign of life"
    assert results == [message, message, "never came"]
    assert "read: waiting for rank 2 since" in caplog.text
    thread.join()


def test_a_rank_is_dead_once_its_heartbeat_is_old(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one look later; and a run that was suspended as a whole has lost no rank."""
    store, now = dist.HashStore(), [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    watch = patient_wait._AbsenceWatch(store, "w", HOSTS)

    def look_after(seconds: float) -> bool:
        now[0] += seconds
        watch.look_for_dead_ranks("read")
        return store.check(["w/end"])

    store.set("w/1", "")  # it has come
    found = [look_after(2) for _ in range(3)]
    store.add("pulse/2", 1)
    found += [look_after(2), look_after(3600)]
    assert not any(found)
    looks = next(n for n in range(1, 20) if look_after(2))
    assert 2 * looks + 4 == patient_wait.WATCH_SECONDS
    assert store.get("w/end") == b"rank 2 on node2"


def test_the_last_line_of_a_survivor_names_the_dead_rank() -> None:
    error = LostRankError("rank 1 on b died during the phase 'load base': no sign of life")
    line = World(0, 2, 0, 2, "a").explain_failure(error)
    assert line is not None and line.startswith("rank 0 on ") and line.endswith(f" stops: {error}")


def test_rank_0_stays_until_the_slowest_has_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its end closes the store. A rank that has died is not waited for."""
    store = dist.HashStore()
    confirm_answer_read(store, 1, HOSTS, "r")  # at once
    slow = threading.Timer(0.6, confirm_answer_read, (store, 2, HOSTS, "r"))
    start = time.monotonic()
    slow.start()
    confirm_answer_read(store, 0, HOSTS, "r")
    assert time.monotonic() - start > 0.5
    monkeypatch.setattr(patient_wait, "WATCH_SECONDS", 0.2)
    monkeypatch.setattr(patient_wait, "LOOK_SECONDS", 0.1)
    start = time.monotonic()
    confirm_answer_read(store, 0, HOSTS, "dead")
    assert 0.3 < time.monotonic() - start < 10


def test_an_answer_that_was_read_needs_no_store() -> None:
    class GoneStore(dist.HashStore):
        def set(self, *arguments: object) -> None:
            raise dist.DistNetworkError("Broken pipe")

    confirm_answer_read(GoneStore(), 1, HOSTS, "r")
