"""Random JSON, bytes, and damage of what is right."""

import json
from typing import Any

from hypothesis import strategies as st

NUMBERS = st.one_of(
    st.integers(-2, 9), st.sampled_from([2**31, 2**63, -(2**63), 10**30]), st.floats()
)
TEXTS = st.text(max_size=6)


def values(*words: str) -> st.SearchStrategy[Any]:
    """JSON values, in which ``words`` are often keys and texts."""
    names = st.sampled_from(words) | TEXTS
    leaves = st.none() | st.booleans() | NUMBERS | names
    return st.recursive(
        leaves,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=4),
        max_leaves=8,
    )


@st.composite
def damaged_tree(draw: st.DrawFn, tree: Any, words: tuple[str, ...]) -> Any:
    """``tree`` with one to three of its parts replaced, removed or renamed."""
    tree = json.loads(json.dumps(tree))
    for _ in range(draw(st.integers(1, 3))):
        node = tree
        while isinstance(node, dict | list) and node:
            keys = list(node) if isinstance(node, dict) else range(len(node))
            key = draw(st.sampled_from(list(keys)))
            if isinstance(node[key], dict | list) and node[key] and draw(st.booleans()):
                node = node[key]
                continue
            action = draw(st.sampled_from(["replace", "replace", "remove", "rename"]))
            if action == "replace":
                node[key] = draw(values(*words))
            elif action == "remove":
                del node[key]
            elif isinstance(node, dict):
                node[draw(st.sampled_from(words) | TEXTS)] = node.pop(key)
            break
    return tree


@st.composite
def damaged_bytes(draw: st.DrawFn, data: bytes) -> bytes:
    """``data`` with bytes changed, cut, put in or put twice."""
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data)))
        until = min(at + draw(st.integers(1, 16)), len(data))
        action = draw(st.sampled_from(["change", "cut", "insert", "repeat", "end"]))
        if action == "change":
            data = (
                data[:at] + draw(st.binary(min_size=until - at, max_size=until - at)) + data[until:]
            )
        elif action == "cut":
            data = data[:at] + data[until:]
        elif action == "insert":
            data = data[:at] + draw(st.binary(max_size=8)) + data[at:]
        elif action == "repeat":
            data = data[:until] + data[at:]
        else:
            data = data[:at]
    return data
