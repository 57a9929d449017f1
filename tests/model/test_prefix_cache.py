"""A prefix in the place of a cache."""

import torch
from transformers import DynamicCache

from dist_peft.model.prefix_cache import PrefixCache, fill_cache_with_prefix

PREFIX = [(torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)) for _ in range(2)]


def test_keeps_nothing_of_what_passes() -> None:
    """A block that is computed twice must find the same twice."""
    cache = PrefixCache(PREFIX)
    states = torch.randn(2, 3, 6, 5), torch.randn(2, 3, 6, 5)
    for _ in range(2):
        for layer, prefix in enumerate(PREFIX):
            for found, mine, new in zip(cache.update(*states, layer), prefix, states, strict=True):
                assert torch.equal(found, torch.cat([mine, new], 2))
        assert cache.get_seq_length() == 4
        assert cache.get_mask_sizes(6, 0) == (10, 0)


def test_gradients_flow_into_the_prefix() -> None:
    keys = torch.randn(1, 1, 2, 3, requires_grad=True)
    found, _ = PrefixCache([(keys, keys)]).update(torch.ones(1, 1, 4, 3), torch.ones(1, 1, 4, 3), 0)
    found.sum().backward()
    assert torch.equal(keys.grad, torch.ones_like(keys))


def test_a_models_own_cache_starts_with_the_prefix_and_grows() -> None:
    cache = DynamicCache()
    fill_cache_with_prefix(cache, PREFIX)
    assert cache.get_seq_length() == 4
    new = torch.randn(2, 3, 1, 5)
    keys, _ = cache.update(new, new, 1)
    assert torch.equal(keys, torch.cat([PREFIX[1][0], new], 2))
