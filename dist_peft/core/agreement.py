"""Check that all ranks run the same configuration, and find the keys in which they differ.

The exchange goes through the key-value store of the rendezvous and not through collectives: ranks
that run different things would come to different collectives, with different shapes. Each rank
writes one digest and reads one verdict; only where digests differ, one rank of each group with
equal digests writes its values, and rank 0 writes the message that all raise.
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from dist_peft.core.errors import UserError

__all__ = [
    "KeyValueStore",
    "exchange_values",
    "flatten_tree",
    "format_ranks",
    "format_value",
    "hash_json_value",
]

POLL_SECONDS = (0.002, 0.1)
"""The first and the longest wait between two looks at the store."""

GRACE_SECONDS = 5.0
MOST_KEYS = 8
"""Named in one message."""

LONGEST_VALUE = 80

NOT_SET = "not set"


class KeyValueStore(Protocol):
    """The part of ``torch.distributed.Store`` that is used."""

    def set(self, key: str, value: str, /) -> None: ...

    def get(self, key: str, /) -> bytes: ...

    def check(self, keys: list[str], /) -> bool: ...

    def add(self, key: str, amount: int, /) -> int: ...


def exchange_values(
    store: KeyValueStore,
    rank: int,
    hosts: Sequence[str],
    topic: str,
    values: Mapping[str, object],
    seconds: float,
    wait_for_all: Callable[[], object] = lambda: None,
) -> str:
    """Compare ``values`` over all ranks; every rank calls it with the same ``topic``.

    Args:
        store: shared by all ranks.
        hosts: the host of each rank.
        topic: prefix of the keys in the store, not used before.
        values: the values that must be equal, by key; anything that JSON can represent.
        seconds: the longest wait for the others.
        wait_for_all: waits until every rank has called it, after this one has sent its digest; may
            notice earlier that a rank does not come.

    Returns:
        The differences with ranks, hosts and values; empty where all values are equal. The same
        text on every rank; other ranks may not have read it yet.

    Raises:
        UserError: a rank did not come within ``seconds``.
    """
    store.set(f"{topic}/digest/{rank}", hash_json_value(values))
    wait_for_all()
    if rank == 0:
        _write_comparison_verdict(store, len(hosts), topic, seconds)
    _wait_for_keys(store, [f"{topic}/verdict"], seconds + GRACE_SECONDS, "rank 0")
    groups: list[list[int]] = json.loads(store.get(f"{topic}/verdict"))
    if not groups:
        return ""
    if any(group[0] == rank for group in groups):
        store.set(f"{topic}/values/{rank}", json.dumps(dict(values)))
    if rank == 0:
        speakers = [f"{topic}/values/{group[0]}" for group in groups]
        _wait_for_keys(store, speakers, seconds, "a rank with other values")
        told = [json.loads(store.get(key)) for key in speakers]
        message = describe_differences(list(zip(groups, told, strict=True)), hosts)
        store.set(f"{topic}/message", message)
    _wait_for_keys(store, [f"{topic}/message"], seconds + GRACE_SECONDS, "rank 0")
    return store.get(f"{topic}/message").decode()


def _write_comparison_verdict(store: KeyValueStore, size: int, topic: str, seconds: float) -> None:
    """Write, on rank 0, which ranks have equal digests; nothing if all have."""
    keys = [f"{topic}/digest/{rank}" for rank in range(size)]
    end = time.monotonic() + seconds
    pause, longest = POLL_SECONDS
    while not store.check(keys):
        if time.monotonic() > end:
            missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
            raise UserError(
                f"{format_ranks(missing)} sent no values within {seconds:g} s; look for "
                "an earlier error there"
            )
        time.sleep(pause)
        pause = min(2 * pause, longest)
    groups: dict[bytes, list[int]] = {}
    for rank, key in enumerate(keys):
        groups.setdefault(store.get(key), []).append(rank)
    store.set(f"{topic}/verdict", json.dumps(list(groups.values()) if len(groups) > 1 else []))


def _wait_for_keys(store: KeyValueStore, keys: list[str], seconds: float, whom: str) -> None:
    end = time.monotonic() + seconds
    pause, longest = POLL_SECONDS
    while not store.check(keys):
        if time.monotonic() > end:
            raise UserError(
                f"{whom} did not answer within {seconds:g} s while the ranks compared their "
                "configuration; look for an earlier error there"
            )
        time.sleep(pause)
        pause = min(2 * pause, longest)


def describe_differences(
    told: Sequence[tuple[Sequence[int], Mapping[str, object]]], hosts: Sequence[str]
) -> str:
    """Return ``train.lr is 0.01 on rank 0 (node1) and 0.02 on ranks 1-3 (node1, node2); ...``.

    Args:
        told: groups of ranks, and the values of each; the first group is rank 0's.
        hosts: the host of each rank.
    """
    keys = list(dict.fromkeys(key for _, values in told for key in values))
    texts = []
    for key in keys:
        by_value: dict[str, list[int]] = {}
        originals: dict[str, object] = {}
        for ranks, values in told:
            text = json.dumps(values[key], sort_keys=True) if key in values else NOT_SET
            by_value.setdefault(text, []).extend(ranks)
            originals[text] = format_value(values[key]) if key in values else NOT_SET
        if len(by_value) > 1:
            parts = [
                f"{originals[t]} on {_format_ranks_with_hosts(r, hosts)}"
                for t, r in by_value.items()
            ]
            texts.append(f"{key} is {' and '.join(parts)}")
    more = f"; and {len(texts) - MOST_KEYS} more keys" if len(texts) > MOST_KEYS else ""
    return "; ".join(texts[:MOST_KEYS]) + more


def _format_ranks_with_hosts(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    names = list(dict.fromkeys(hosts[rank] for rank in sorted(ranks)))
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{format_ranks(ranks)} ({', '.join(names[:3])}{more})"


def hash_json_value(value: object) -> str:
    """Return the hexadecimal SHA-256 of ``value`` as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def format_value(value: object) -> str:
    """Return ``value`` as JSON for a message; a long text is cut and its digest appended."""
    text = json.dumps(value, sort_keys=True)
    if len(text) <= LONGEST_VALUE:
        return text
    return f"{text[: LONGEST_VALUE // 2]}... (SHA-256 {hash_json_value(value)[:12]})"


def flatten_tree(tree: Any, prefix: str = "") -> dict[str, object]:
    """Flatten ``{"a": {"b": 1}, "c": [{"d": 2}], "e": [3]}`` to ``{"a.b": 1, "c[0].d": 2, "e":
    [3]}``.

    Empty sections have no entry.
    """
    if isinstance(tree, Mapping):
        flat: dict[str, object] = {}
        for key, value in tree.items():
            flat |= flatten_tree(value, f"{prefix}.{key}" if prefix else str(key))
        return flat
    if isinstance(tree, list) and tree and all(isinstance(entry, Mapping) for entry in tree):
        flat = {}
        for number, entry in enumerate(tree):
            flat |= flatten_tree(entry, f"{prefix}[{number}]")
        return flat
    return {prefix: list(tree) if isinstance(tree, tuple) else tree}


def format_ranks(ranks: Sequence[int]) -> str:
    """Return ``[1, 3, 4, 5]`` as ``ranks 1, 3-5``."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and runs[-1][1] == rank - 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    text = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {text}"
