"""Ranks compare values through a store: equal, different, absent."""

import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_peft.core import agreement
from dist_peft.core.agreement import (
    describe_differences,
    exchange_values,
    flatten_tree,
    format_ranks,
    format_value,
    hash_json_value,
)
from dist_peft.core.errors import UserError


class MemoryStore:
    """A store within one process, that counts what is written."""

    def __init__(self) -> None:
        self.data: dict[str, bytes] = {}
        self.counts: dict[str, int] = {}
        self.lock = threading.Lock()

    def set(self, key: str, value: str) -> None:
        self.data[key] = value.encode()

    def get(self, key: str) -> bytes:
        return self.data[key]

    def check(self, keys: list[str]) -> bool:
        return all(key in self.data for key in keys)

    def add(self, key: str, amount: int) -> int:
        with self.lock:
            self.counts[key] = self.counts.get(key, 0) + amount
            return self.counts[key]


def exchange(values: list[dict[str, object] | None], seconds: float = 20) -> list[Any]:
    """What each rank got; a rank with None does not come. And the store, last."""
    store, hosts = MemoryStore(), [f"h{r // 2}" for r in range(len(values))]
    got: list[Any] = [None] * len(values)

    def run(rank: int, own: dict[str, object]) -> None:
        try:
            got[rank] = exchange_values(store, rank, hosts, "t", own, seconds)
        except UserError as error:
            got[rank] = error

    own = [(r, v) for r, v in enumerate(values) if v is not None]
    threads = [threading.Thread(target=run, args=pair) for pair in own]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return [*got, store]


def test_digests_are_there_before_the_ranks_wait_for_each_other() -> None:
    """After that none waits for a rank that has died."""
    store, seen = MemoryStore(), list[bool]()
    assert (
        exchange_values(
            store, 0, ["h"], "t", {"a": 1}, 5, lambda: seen.append(store.check(["t/digest/0"]))
        )
        == ""
    )
    assert seen == [True]


def test_equal_values_cost_one_digest_a_rank() -> None:
    *got, store = exchange([{"a": 1, "b": [2]}, {"b": [2], "a": 1}, {"a": 1, "b": [2]}])
    assert got == ["", "", ""]
    assert sorted(store.data) == [*(f"t/digest/{r}" for r in range(3)), "t/verdict"]


def test_difference_is_told_alike_to_all() -> None:
    *got, store = exchange([{"lr": 1, "x": 0}, {"lr": 2, "x": 0}, {"lr": 2, "x": 0}, {"x": 0}])
    assert (
        got == ["lr is 1 on rank 0 (h0) and 2 on ranks 1-2 (h0, h1) and not set on rank 3 (h1)"] * 4
    )
    # one of the ranks with equal digests speaks for all
    told = sorted(k for k in store.data if "values" in k)
    assert told == ["t/values/0", "t/values/1", "t/values/3"]


def test_absent_rank_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "GRACE_SECONDS", 0.2)
    first, second, _, _ = exchange([{"a": 1}, {"a": 1}, None], seconds=0.2)
    assert "rank 2 sent no values within 0.2 s" in str(first)
    assert "rank 0 did not answer" in str(second)


def test_many_differences_are_counted() -> None:
    told = [([0], {str(k): 0 for k in range(11)}), ([1], {str(k): 1 for k in range(11)})]
    text = describe_differences(told, ["a", "b"])
    assert text.count(" on rank 0 (a)") == 8 and text.endswith("; and 3 more keys")


def test_long_values_that_differ_late_look_different() -> None:
    one, other = "x" * 200 + "1", "x" * 200 + "2"
    assert format_value(one) != format_value(other) and len(format_value(one)) < 100
    assert format_value(0.1) == "0.1" and format_value("a") == '"a"'


def test_flat_keys() -> None:
    tree = {"a": {"b": 1, "c": {}}, "d": [{"e": 2}, {"f": None}], "g": [3, 4], "h": []}
    assert flatten_tree(tree) == {"a.b": 1, "d[0].e": 2, "d[1].f": None, "g": [3, 4], "h": []}


def test_names_of_ranks() -> None:
    assert format_ranks([5]) == "rank 5"
    assert format_ranks([4, 1, 3, 5]) == "ranks 1, 3-5"


SCALARS = st.none() | st.booleans() | st.integers() | st.text(max_size=5)
TREES = st.dictionaries(st.text(max_size=5), SCALARS, max_size=6)


@given(TREES, TREES)
def test_differences_are_named_exactly_where_digests_differ(a: Any, b: Any) -> None:
    text = describe_differences([([0], a), ([1], b)], ["h", "h"])
    assert (text == "") == (hash_json_value(a) == hash_json_value(b))
