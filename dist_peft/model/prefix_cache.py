"""Keys and values of a trained prefix, where a model looks for those of earlier tokens.

A decoder that is given a ``Cache`` puts its contents before the keys and values of the tokens at
hand, counts their positions and lets every token see them: that is prefix-tuning. Two ways to fill
one::

    training      PrefixCache stores no new states: a block that is recomputed in backward
    (activation checkpointing) sees the same prefix as in forward generation    the model's own
    starts with the prefix and grows with each token (``fill``)

Keys are stored as in any cache: rotary positions applied, one head a group of query heads.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

__all__ = ["KeysValues", "PrefixCache", "fill_cache_with_prefix"]

KeysValues = Sequence[tuple[Tensor, Tensor]]
"""For each layer keys and values ``[B, heads, P, head size]``."""


class _PrefixLayer(DynamicLayer):
    """One layer's prefix, the same before and after any number of updates."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.prefix = keys, values
        self.keys, self.values = keys, values  # where a cache's length is read from

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Return the prefix followed by the ``[B, heads, S, head size]`` states of this call."""
        keys, values = self.prefix
        return torch.cat([keys, key_states], 2), torch.cat([values, value_states], 2)


class PrefixCache(Cache):
    """A cache of every layer's prefix alone. Gradients flow into ``prefix``."""

    def __init__(self, prefix: KeysValues) -> None:
        super().__init__(layers=[_PrefixLayer(keys, values) for keys, values in prefix])


def fill_cache_with_prefix(cache: Cache, prefix: KeysValues) -> None:
    """Put the prefix into an empty cache of the model's own kind."""
    for layer, (keys, values) in enumerate(prefix):
        cache.update(keys, values, layer)
