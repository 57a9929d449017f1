"""Quantiles and histograms of lengths, against counting one by one."""

from itertools import pairwise

import numpy as np
import pytest

from dist_peft.data.length_statistics import HistogramBin, draw_histogram, measure_lengths


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("most", [1, 2, 9, 300, 70_000])
def test_bins_cover_all_lengths_without_gaps(seed: int, most: int) -> None:
    lengths = np.random.default_rng(seed).integers(1, most + 1, 50)
    found = measure_lengths(lengths, 128, 1000)
    bins = found.histogram
    assert bins[0].first == lengths.min() == found.shortest
    assert bins[-1].last == lengths.max() == found.longest
    assert all(a.last + 1 == b.first for a, b in pairwise(bins))
    for each in bins:
        assert each.documents == sum(each.first <= n <= each.last for n in lengths.tolist())
    for edge in (128, 1000):
        if found.shortest <= edge < found.longest:
            assert edge in {each.last for each in bins}


def test_statistics() -> None:
    found = measure_lengths(np.array([4, 8, 6, 2]))
    assert (found.documents, found.tokens, found.median, found.mean) == (4, 20, 5, 5)
    lengths = np.arange(1, 101)
    p95 = measure_lengths(lengths).p95
    assert (lengths <= p95).mean() >= 0.95 > (lengths <= p95 - 1).mean()


def test_bars_mark_longer_documents_and_show_single_ones() -> None:
    bins = (HistogramBin(1, 8, 4000), HistogramBin(9, 16, 0), HistogramBin(17, 20, 1))
    assert draw_histogram(bins, 16) == [
        " 1 - 8      4,000 " + "#" * 40,
        " 9 - 16         0",
        "17 - 20         1 #  > data.seq_len 16",
    ]
