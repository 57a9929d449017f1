"""The order of sequences of a run: one shuffled pool, or a mixture of several data sets.

A *position* is an index into the infinite order of a run; step ``s`` takes the positions
``[s*G, (s+1)*G)`` (``data.loader``). Without mixing, all sequences form one pool, reshuffled in
each epoch. With mixing, the source of each position is sampled, and each source yields its
sequences, epoch after epoch::

    position   0 1 2 3 | 4 5 6 7 | ...       G = 4
    source     a a b a | b a a b |           sampled from the shares at that step
    sequence   0 1 0 2 | 1 3 4 2 |           the source's next one

Shares of the active sources of a step, normalized (``data.mixing``)::

    weights    p_i ~ weight_i
    sizes      p_i ~ size_i ** (1 / temperature)    temperature 1: by size; large: equal
               (temperature-scaled mixing, Raffel et al. 2020, section 3.5.2)

A source is active at the steps ``[from_step, to_step)``: a curriculum.

Where records have variants (``data.augmenting``), an epoch has one of each record: the sequences of
epoch ``k`` are the ranges ``epochs[k % len(epochs)]``.

Samples are a function of seed and position, so a step holds the same sequences at any world size,
and any step can be built directly: the number of sequences a source has yielded before a block of
positions is counted once, block by block. Shares are of sequences; packed ones all have about
``seq_len`` tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dist_peft.core.config.run import DataConfig
from dist_peft.core.errors import UserError

__all__ = [
    "MixtureOrder",
    "MixtureShare",
    "PoolOrder",
    "Ranges",
    "SequenceOrder",
    "describe_epochs",
    "make_mixture_shares",
]

_BLOCK = 2**14
"""Number of positions whose sources are sampled at a time."""

_DRAWS = 2**63
"""Offset of block numbers in the random key: mixing and permutations share no random numbers."""

Ints = NDArray[np.int64]

Ranges = Sequence[tuple[int, int]]
"""Sequence indices ``[first, stop)`` of each part."""


def describe_epochs(epochs: list[Ranges]) -> str:
    """Return where the variants of records go, for messages; empty without variants."""
    return f" of {len(epochs)} epochs with a variant of each record" if len(epochs) > 1 else ""


class SequenceOrder(Protocol):
    """The order in which a run takes sequences."""

    def list_rows(self, first: int, count: int) -> list[int]:
        """Return the sequence indices of the positions ``[first, first + count)``."""

    def check_steps(self, steps: int) -> None:
        """Check that each of the first ``steps`` steps has sequences.

        Raises:
            UserError: one has none.
        """


class PoolOrder:
    """All sequences in one pool, reshuffled in each epoch.

    Args:
        size: number of sequences.
        epochs: those of each epoch, in turn; None: all in each.
    """

    def __init__(
        self, size: int, seed: int, shuffle: bool, epochs: Sequence[Ranges] | None = None
    ) -> None:
        self._pool = _ShuffledEpochs(epochs or [[(0, size)]], seed, 0, shuffle)

    def list_rows(self, first: int, count: int) -> list[int]:
        return [self._pool.get_row(place) for place in range(first, first + count)]

    def check_steps(self, steps: int) -> None:
        """Accept any number of steps: a pool has sequences for every step."""


@dataclass(frozen=True)
class MixtureShare:
    """One source of a mixture.

    Attributes:
        start, size: its sequence indices are ``[start, start + size)``.
        weight: unnormalized share of the sequences while it is active.
        from_step, to_step: active at the steps ``[from_step, to_step)``; None: to the end.
        epochs: its sequence indices in each epoch, in turn; empty: all in each.
    """

    start: int
    size: int
    weight: float
    from_step: int = 0
    to_step: int | None = None
    epochs: Sequence[Ranges] = ()

    @property
    def epoch_ranges(self) -> Sequence[Ranges]:
        """Return the sequence indices of each epoch."""
        return self.epochs or [[(self.start, self.start + self.size)]]

    def compute_weight(self, step: int) -> float:
        """Return the weight at ``step``; 0 where the source is not active."""
        begun = step >= self.from_step
        return self.weight if begun and (self.to_step is None or step < self.to_step) else 0.0


class MixtureOrder:
    """Sample the source of each position by weight; each source yields its own sequences in turn.

    Args:
        shares: at least one.
        global_batch: positions per step.
        seed: of the sampling, and of the order within each source.
        shuffle: whether each source is shuffled.
    """

    def __init__(
        self, shares: Sequence[MixtureShare], *, global_batch: int, seed: int, shuffle: bool
    ) -> None:
        self._shares, self._global_batch, self._seed = tuple(shares), global_batch, seed
        self._epochs = [
            _ShuffledEpochs(s.epoch_ranges, seed, 1 + i, shuffle) for i, s in enumerate(shares)
        ]
        ends = {s.from_step for s in shares} | {s.to_step for s in shares if s.to_step is not None}
        self._phases = np.array(sorted({0, *ends}), dtype=np.int64)
        weights = [[s.compute_weight(int(step)) for s in shares] for step in self._phases]
        self._cumulated = np.cumsum(np.array(weights, dtype=np.float64), axis=1)
        self._served = [np.zeros(len(shares), dtype=np.int64)]  # sampled before each block

    def list_rows(self, first: int, count: int) -> list[int]:
        found: list[int] = []
        for block in range(first // _BLOCK, (first + count - 1) // _BLOCK + 1):
            sources, turns = self._draw_block(block)
            begin = block * _BLOCK
            low, high = max(first - begin, 0), min(first + count - begin, _BLOCK)
            for source, turn in zip(sources[low:high], turns[low:high], strict=True):
                found.append(self._epochs[source].get_row(int(turn)))
        return found

    def check_steps(self, steps: int) -> None:
        for number, begin in enumerate(self._phases.tolist()):
            if begin < steps and self._cumulated[number, -1] == 0:
                raise UserError(
                    f"no source of data.train is active at step {begin}; set from_step and "
                    "to_step so that one is at every step"
                )

    def _draw_block(self, block: int) -> tuple[Ints, Ints]:
        """Return the source of each position of a block, and how often it was sampled before."""
        while len(self._served) <= block:
            drawn = self._draw_sources(len(self._served) - 1)
            more = np.bincount(drawn, minlength=len(self._shares))
            self._served.append(self._served[-1] + more)
        sources = self._draw_sources(block)
        turns = np.empty_like(sources)
        for source, before in enumerate(self._served[block].tolist()):
            mine = sources == source
            turns[mine] = before + np.arange(int(mine.sum()))
        return sources, turns

    def _draw_sources(self, block: int) -> Ints:
        """Return a sampled source for each position of a block: int64 [_BLOCK]."""
        places = np.arange(block * _BLOCK, (block + 1) * _BLOCK, dtype=np.int64)
        phase = np.searchsorted(self._phases, places // self._global_batch, side="right") - 1
        cumulated = self._cumulated[phase]
        key = np.array([self._seed, _DRAWS + block], dtype=np.uint64)
        uniform = (np.random.Philox(key=key).random_raw(_BLOCK) >> np.uint64(11)) * 2.0**-53
        total = cumulated[:, -1]
        drawn = np.minimum(uniform * total, np.nextafter(total, 0))  # the product may round up
        # the first source whose cumulative weight exceeds the sample; inactive ones add nothing
        return (cumulated <= drawn[:, None]).sum(axis=1).clip(max=len(self._shares) - 1)


def make_mixture_shares(
    config: DataConfig,
    sizes: Sequence[int],
    epochs: Sequence[Sequence[Ranges]] | None = None,
) -> list[MixtureShare]:
    """Return the shares of the sources of ``config.train``, whose sequences are concatenated.

    Args:
        config: ``mixing`` is weights or sizes.
        sizes: number of sequences of each source.
        epochs: of each source, the sequence indices of each epoch; None: all in each.
    """
    epochs = epochs or [() for _ in sizes]
    per_epoch = [size / max(1, len(own)) for size, own in zip(sizes, epochs, strict=True)]
    shares, start, largest = [], 0, max(per_epoch)
    for source, size, served, own in zip(config.train, sizes, per_epoch, epochs, strict=True):
        by_size = (served / largest) ** (1 / config.temperature)
        weight = source.weight if config.mixing == "weights" else by_size
        shares.append(MixtureShare(start, size, weight, source.from_step, source.to_step, own))
        start += size
    return shares


class _ShuffledEpochs:
    """Sequence indices, epoch after epoch, in a different order each time."""

    def __init__(self, epochs: Sequence[Ranges], seed: int, stream: int, shuffle: bool) -> None:
        self._epochs, self._seed, self._stream, self._shuffle = epochs, seed, stream, shuffle
        self._ends = np.cumsum([sum(stop - first for first, stop in own) for own in epochs])
        self._known: dict[int, Ints] = {}

    def get_row(self, turn: int) -> int:
        cycle, turn = divmod(turn, int(self._ends[-1]))
        part = int(np.searchsorted(self._ends, turn, side="right"))
        epoch, place = cycle * len(self._ends) + part, turn - int(self._ends[part - 1]) * (part > 0)
        if epoch not in self._known:
            # a step may straddle two epochs
            self._known = {e: o for e, o in self._known.items() if e >= epoch - 1}
            rows = np.concatenate([np.arange(*each) for each in self._epochs[part]])
            self._known[epoch] = rows[self._permute_epoch(epoch, len(rows))]
        return int(self._known[epoch][place])

    def _permute_epoch(self, epoch: int, size: int) -> Ints:
        """Return the permutation of an epoch: indices sorted by random 64-bit numbers.

        Raw Philox output is the one random stream that numpy guarantees to keep (NEP 19), so a run
        resumed under another version keeps the same order.
        """
        if not self._shuffle:
            return np.arange(size)
        key = np.array([self._seed, (self._stream << 40) + epoch], dtype=np.uint64)
        return np.argsort(np.random.Philox(key=key).random_raw(size), kind="stable")
