"""Seeds of random generators, derived from a run's seed and the place where they are used."""

import hashlib
import random
from typing import Any

__all__ = ["RandomDraws", "derive_seed"]


def derive_seed(*parts: object) -> int:
    """Return a 63-bit seed from printable parts: the same in every process, on every platform."""
    text = "\0".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


class RandomDraws:
    """Random numbers that stay the same in later versions of Python.

    Of the methods of ``random.Random`` only ``random`` is guaranteed to.
    """

    def __init__(self, *parts: object) -> None:
        self._generator = random.Random(derive_seed(*parts))

    def draw_uniform(self) -> float:
        """Return a number in [0, 1)."""
        return self._generator.random()

    def draw_index(self, count: int) -> int:
        """Return a number in [0, count)."""
        return min(int(self._generator.random() * count), count - 1)

    def shuffle(self, items: list[Any]) -> None:
        """Shuffle in place (Fisher-Yates)."""
        for last in range(len(items) - 1, 0, -1):
            other = self.draw_index(last + 1)
            items[last], items[other] = items[other], items[last]
