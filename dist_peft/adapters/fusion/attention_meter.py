"""How much attention each fused adapter gets, layer by layer, added up over tokens.

Layers add their attention weights while the meter is on (``counting``); a token counts with its
weight, 0 for padding, for the task that its row is of::

    sums[layer][task, adapter] += weights[row, token] * attention[row, token, adapter]
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["AttentionMeter"]


class AttentionMeter:
    """Adds up the attention weights that the fusion layers of a model compute.

    Attributes:
        sums: layer's path -> float64 ``[tasks, N]`` on the CPU.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self._rows: tuple[Tensor, Sequence[int], int] | None = None

    @property
    def is_counting(self) -> bool:
        return self._rows is not None

    @contextmanager
    def count_attention(self, weights: Tensor, tasks: Sequence[int], count: int) -> Iterator[None]:
        """The next forward computes a batch whose tokens count so much.

        Args:
            weights: ``[B, S]``.
            tasks: the number of each row's task, below ``count``.
            count: how many tasks there are.
        """
        self._rows = (weights, tasks, count)
        try:
            yield
        finally:
            self._rows = None

    def add_attention(self, path: str, attention: Tensor) -> None:
        """``attention``: float32 ``[B, S, N]``."""
        assert self._rows is not None
        weights, tasks, count = self._rows
        weighed = attention.double() * weights.to(attention.device).unsqueeze(-1)
        rows = weighed.sum(1).cpu()
        empty = torch.zeros(count, attention.shape[-1], dtype=torch.float64)
        self.sums.setdefault(path, empty).index_add_(0, torch.tensor(list(tasks)), rows)
