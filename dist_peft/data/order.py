"""Which row each place of a run takes: one shuffled pool, or several data sets mixed.

A *place* is a row of the endless sequence of a run; step ``s`` takes the places ``[s*G, (s+1)*G)``
(``data.loader``). Without mixing, all rows form one pool, shuffled anew in each epoch. With mixing,
each place draws its source, and each source serves its own rows, epoch after epoch::

    place      0 1 2 3 | 4 5 6 7 | ...       G = 4
    source     a a b a | b a a b |           drawn from the shares that hold at the step
    row        0 1 0 2 | 1 3 4 2 |           the source's next one

Shares of the sources that are in play at a step, normalized (``data.mixing``)::

    weights    p_i ~ weight_i
    sizes      p_i ~ rows_i ** (1 / temperature)    temperature 1: by size; large: equal
               (temperature-scaled mixing, Raffel et al. 2020, section 3.5.2)

A source is in play at the steps ``[from_step, to_step)``: a curriculum.

Draws are a function of seed and place, so a step holds the same rows at any world size, and any
step can be made: how many rows a source has served before a block of places is counted once, block
by block. Shares are of rows; packed rows all have about ``seq_len`` tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dist_peft.core.config.run import DataConfig
from dist_peft.core.errors import UserError

__all__ = ["MixedOrder", "Order", "PoolOrder", "Share", "shares_of"]

_BLOCK = 2**14
"""Places whose sources are drawn at a time."""

_DRAWS = 2**63
"""Added to the number of a block: draws share no random numbers with permutations."""

Ints = NDArray[np.int64]


class Order(Protocol):
    """Which rows the places of a run take."""

    def rows(self, first: int, count: int) -> list[int]:
        """Row numbers of the places ``[first, first + count)``."""

    def check(self, steps: int) -> None:
        """See that each of the first ``steps`` steps has rows.

        Raises:
            UserError: one has none.
        """


class PoolOrder:
    """All rows, shuffled anew in each epoch."""

    def __init__(self, size: int, seed: int, shuffle: bool) -> None:
        self._pool = _Epochs(size, seed, 0, shuffle)

    def rows(self, first: int, count: int) -> list[int]:
        return [self._pool.row(place) for place in range(first, first + count)]

    def check(self, steps: int) -> None:
        """A pool has rows for every step."""


@dataclass(frozen=True)
class Share:
    """One source of a mixture.

    Attributes:
        start, size: its row numbers are ``[start, start + size)``.
        weight: share of the rows while it is in play, up to normalization.
        from_step, to_step: in play at the steps ``[from_step, to_step)``; None: to the end.
    """

    start: int
    size: int
    weight: float
    from_step: int = 0
    to_step: int | None = None

    def weight_at(self, step: int) -> float:
        """0 where it is not in play."""
        begun = step >= self.from_step
        return self.weight if begun and (self.to_step is None or step < self.to_step) else 0.0


class MixedOrder:
    """Draws the source of each place. See the module.

    Args:
        shares: at least one.
        global_batch: places a step.
        seed, shuffle: of the draws, and of the order inside each source.
    """

    def __init__(
        self, shares: Sequence[Share], *, global_batch: int, seed: int, shuffle: bool
    ) -> None:
        self._shares, self._global_batch, self._seed = tuple(shares), global_batch, seed
        self._epochs = [_Epochs(s.size, seed, 1 + i, shuffle) for i, s in enumerate(shares)]
        ends = {s.from_step for s in shares} | {s.to_step for s in shares if s.to_step is not None}
        self._phases = np.array(sorted({0, *ends}), dtype=np.int64)
        weights = [[s.weight_at(int(step)) for s in shares] for step in self._phases]
        self._cumulated = np.cumsum(np.array(weights, dtype=np.float64), axis=1)
        self._served = [np.zeros(len(shares), dtype=np.int64)]  # before each block

    def rows(self, first: int, count: int) -> list[int]:
        found: list[int] = []
        for block in range(first // _BLOCK, (first + count - 1) // _BLOCK + 1):
            sources, turns = self._block(block)
            begin = block * _BLOCK
            low, high = max(first - begin, 0), min(first + count - begin, _BLOCK)
            for source, turn in zip(sources[low:high], turns[low:high], strict=True):
                found.append(self._shares[source].start + self._epochs[source].row(int(turn)))
        return found

    def check(self, steps: int) -> None:
        for number, begin in enumerate(self._phases.tolist()):
            if begin < steps and self._cumulated[number, -1] == 0:
                raise UserError(
                    f"no source of data.train is in play at step {begin}; set from_step and "
                    "to_step so that one is at every step"
                )

    def _block(self, block: int) -> tuple[Ints, Ints]:
        """The source of each place of a block, and how often it has served before."""
        while len(self._served) <= block:
            drawn = self._draw(len(self._served) - 1)
            more = np.bincount(drawn, minlength=len(self._shares))
            self._served.append(self._served[-1] + more)
        sources = self._draw(block)
        turns = np.empty_like(sources)
        for source, before in enumerate(self._served[block].tolist()):
            mine = sources == source
            turns[mine] = before + np.arange(int(mine.sum()))
        return sources, turns

    def _draw(self, block: int) -> Ints:
        """int64 [_BLOCK]: a source for each place."""
        places = np.arange(block * _BLOCK, (block + 1) * _BLOCK, dtype=np.int64)
        phase = np.searchsorted(self._phases, places // self._global_batch, side="right") - 1
        cumulated = self._cumulated[phase]
        key = np.array([self._seed, _DRAWS + block], dtype=np.uint64)
        uniform = (np.random.Philox(key=key).random_raw(_BLOCK) >> np.uint64(11)) * 2.0**-53
        total = cumulated[:, -1]
        drawn = np.minimum(uniform * total, np.nextafter(total, 0))  # the product may round up
        # the first source whose cumulated weight is beyond; one that is not in play adds nothing
        return (cumulated <= drawn[:, None]).sum(axis=1).clip(max=len(self._shares) - 1)


def shares_of(config: DataConfig, sizes: Sequence[int]) -> list[Share]:
    """Shares of ``config.train``, whose sources have ``sizes`` rows, one after the other.

    Args:
        config: ``mixing`` is weights or sizes.
    """
    shares, start, largest = [], 0, max(sizes)
    for source, size in zip(config.train, sizes, strict=True):
        by_size = (size / largest) ** (1 / config.temperature)
        weight = source.weight if config.mixing == "weights" else by_size
        shares.append(Share(start, size, weight, source.from_step, source.to_step))
        start += size
    return shares


class _Epochs:
    """Rows ``[0, size)`` again and again, in another order each time."""

    def __init__(self, size: int, seed: int, stream: int, shuffle: bool) -> None:
        self._size, self._seed, self._stream, self._shuffle = size, seed, stream, shuffle
        self._known: dict[int, Ints] = {}

    def row(self, turn: int) -> int:
        epoch, place = divmod(turn, self._size)
        if epoch not in self._known:
            # a step may straddle two epochs
            self._known = {e: o for e, o in self._known.items() if e >= epoch - 1}
            self._known[epoch] = self._order(epoch)
        return int(self._known[epoch][place])

    def _order(self, epoch: int) -> Ints:
        """The permutation of an epoch: rows sorted by random 64-bit numbers.

        Raw Philox output is the one random stream that numpy promises never to change (NEP 19), so
        a run resumed under another version goes on with the same order.
        """
        if not self._shuffle:
            return np.arange(self._size)
        key = np.array([self._seed, (self._stream << 40) + epoch], dtype=np.uint64)
        return np.argsort(np.random.Philox(key=key).random_raw(self._size), kind="stable")
