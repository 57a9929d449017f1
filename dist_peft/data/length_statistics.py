"""Lengths of documents in tokens, before they are cut or packed: quantiles and a histogram."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["HistogramBin", "LengthStatistics", "draw_histogram", "measure_lengths"]

_WIDTH = 40
_FEWEST_BINS = 8
"""Powers of two are halved until there are so many bins, if lengths differ enough."""


@dataclass(frozen=True)
class HistogramBin:
    """``documents`` of ``first`` to ``last`` tokens, both included."""

    first: int
    last: int
    documents: int


@dataclass(frozen=True)
class LengthStatistics:
    """Lengths of ``documents`` documents of together ``tokens`` tokens.

    Attributes:
        p95: 95 % of the documents have at most so many tokens.
        histogram: without gaps, from the shortest document to the longest.
    """

    documents: int
    tokens: int
    shortest: int
    median: float
    mean: float
    p95: float
    longest: int
    histogram: tuple[HistogramBin, ...]


def measure_lengths(lengths: NDArray[np.integer[Any]], *edges: int) -> LengthStatistics:
    """Return the statistics of ``lengths`` [D], at least one.

    Args:
        edges: lengths that a bin ends with, such as ``data.seq_len``.
    """
    shortest, longest = int(lengths.min()), int(lengths.max())
    inner = {edge for edge in edges if shortest <= edge < longest}
    step = 1.0
    while True:
        powers = {round(2 ** (step * k)) for k in range(int(np.log2(longest) / step) + 2)}
        ends = sorted({p for p in powers | inner if shortest <= p < longest} | {longest})
        if len(ends) >= min(_FEWEST_BINS, longest - shortest) or step < 0.2:
            break
        step /= 2
    counts = np.histogram(lengths, [shortest, *(end + 1 for end in ends)])[0].tolist()
    firsts = [shortest, *(end + 1 for end in ends[:-1])]
    bins = tuple(HistogramBin(*each) for each in zip(firsts, ends, counts, strict=True))
    return LengthStatistics(
        len(lengths),
        int(lengths.sum(dtype=np.int64)),
        shortest,
        float(np.median(lengths)),
        float(lengths.mean()),
        float(np.percentile(lengths, 95, method="inverted_cdf")),
        longest,
        bins,
    )


def draw_histogram(bins: tuple[HistogramBin, ...], seq_len: int) -> list[str]:
    """Return a line for each bin: its lengths, documents, and a bar; longer ones are marked."""
    most = max(each.documents for each in bins)
    width = len(f"{bins[-1].last}")
    lines = []
    for each in bins:
        size = -(-_WIDTH * each.documents // most)  # at least one character unless it is empty
        mark = f"  > data.seq_len {seq_len}" if each.first > seq_len and each.documents else ""
        lines.append(
            f"{each.first:>{width}} - {each.last:<{width}} {each.documents:>9,} "
            f"{'#' * size}{mark}".rstrip()
        )
    return lines
