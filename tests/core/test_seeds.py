"""Seeds derived from parts."""

import torch

from dist_peft.core.seeds import derive_seed


def test_seeds_differ_and_fit_a_generator() -> None:
    seeds = {derive_seed(*parts) for parts in [(0, "a"), (0, "b"), (1, "a"), ("0a",), (0, "a", 0)]}
    assert len(seeds) == 5
    for seed in seeds:
        torch.Generator().manual_seed(seed)
    assert derive_seed(7, "model.layers.0", "lora_A") == 6507300586125493599
