"""Pack documents into sequences, by their lengths, and build a sequence's tensors.

A sequence of ``capacity`` tokens holds several documents; each keeps its own positions, so that
attention, bounded by the restarts, never crosses document boundaries::

    tokens     a0 a1 a2 a3 | b0 b1 b2 | c0 c1 | pad pad
    labels     a1 a2 a3  - | b1 b2  - | c1  - |  -   -       -: -100, nothing to predict
    positions   0  1  2  3 |  0  1  2 |  0  1 |  0   1

Best-fit decreasing (Johnson et al. 1974; for token sequences Ding et al. 2024, "Fewer Truncations
Improve Language Modeling"): documents by decreasing length, each into the fullest sequence that
still fits it. At most 11/9 of the optimal number of sequences, plus one; no document is cut.
"""

from array import array
from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["IGNORE", "concatenate_documents", "pack_documents"]

# label of a position without a target: the default ignore_index of torch's cross_entropy
IGNORE = -100

_BLOCK = 4096
"""Documents whose sizes are Python integers at a time."""

Ints = NDArray[np.int64]


def pack_documents(
    lengths: Sequence[int] | NDArray[np.integer[Any]], capacity: int
) -> tuple[Ints, Ints]:
    """Distribute documents over sequences, in O(n log n) time.

    The time is a sort, then a search among at most ``capacity`` different gaps per document.
    Memory is at most 40 bytes a document, and 24 a sequence.

    Args:
        lengths: tokens of each document, each in ``1..capacity``.
        capacity: tokens of a sequence.

    Returns:
        (order, bounds): sequence ``s`` holds the documents ``order[bounds[s]:bounds[s + 1]]``,
        int64 [documents] and [sequences + 1]; documents of a sequence ascend, sequences are sorted
        by their first document, so that unshuffled ones stay near file order. Deterministic.

    Raises:
        ValueError: a length is out of range.
    """
    sizes = np.asarray(lengths)
    if len(sizes) and not 1 <= sizes.min() <= sizes.max() <= capacity:
        raise ValueError(f"lengths {sizes.min()}..{sizes.max()} do not fit sequences of {capacity}")
    windows = _assign_windows(sizes, capacity)
    count = int(windows.max()) + 1 if len(windows) else 0
    first = np.full(count, len(windows))
    # reversed, so that the first of a window's documents is the one that stays
    first[windows[::-1]] = np.arange(len(windows))[::-1]
    number = np.empty(count, np.int32)
    number[np.argsort(first)] = np.arange(count, dtype=np.int32)
    windows = number[windows]
    bounds = np.concatenate([[0], np.cumsum(np.bincount(windows, minlength=count))])
    return np.argsort(windows, kind="stable"), bounds.astype(np.int64)


def _assign_windows(sizes: NDArray[np.integer[Any]], capacity: int) -> NDArray[np.int32]:
    """Return the window of each document [documents], numbered as they were opened."""
    windows = np.empty(len(sizes), np.int32)
    opened = 0
    gaps: list[int] = []  # the distinct gaps of all windows, ascending
    with_gap: dict[int, array[int]] = {}  # gap -> windows
    order = np.argsort(-sizes, kind="stable")
    for block in range(0, len(order), _BLOCK):
        documents = order[block : block + _BLOCK]
        found = []
        for size in sizes[documents].tolist():
            at = bisect_left(gaps, size)
            if at == len(gaps):
                gap, window = capacity, opened
                opened += 1
            else:
                gap = gaps[at]
                window = with_gap[gap].pop()
                if not with_gap[gap]:
                    del with_gap[gap], gaps[at]
            found.append(window)
            if gap > size:
                if gap - size not in with_gap:
                    with_gap[gap - size] = array("i")
                    insort(gaps, gap - size)
                with_gap[gap - size].append(window)
        windows[documents] = found
    return windows


def concatenate_documents(
    documents: Sequence[tuple[NDArray[np.int32], NDArray[np.uint8]]],
) -> tuple[Ints, Ints, Ints]:
    """Concatenate documents to the tokens, labels and positions of a sequence, not padded.

    Args:
        documents: (tokens, mask) of each; mask 1 where a token contributes to the loss.

    Returns:
        tokens, labels, positions, each int64 [sum of lengths]. ``labels[t]`` is the token after
        ``t`` if it is of the same document and contributes to the loss, else -100.
    """
    tokens = np.concatenate([t for t, _ in documents]).astype(np.int64)
    labels = np.full(len(tokens), IGNORE, dtype=np.int64)
    positions = np.empty(len(tokens), dtype=np.int64)
    start = 0
    for document, mask in documents:
        stop = start + len(document)
        labels[start : stop - 1] = np.where(mask[1:], document[1:], IGNORE)
        positions[start:stop] = np.arange(len(document))
        start = stop
    return tokens, labels, positions
