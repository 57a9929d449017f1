"""Seeds derived from parts."""

import torch

from dist_peft.core.seeds import RandomDraws, derive_seed


def test_seeds_differ_and_fit_a_generator() -> None:
    seeds = {derive_seed(*parts) for parts in [(0, "a"), (0, "b"), (1, "a"), ("0a",), (0, "a", 0)]}
    assert len(seeds) == 5
    for seed in seeds:
        torch.Generator().manual_seed(seed)
    assert derive_seed(7, "model.layers.0", "lora_A") == 6507300586125493599


def test_draws_are_fair_and_stay_those_of_this_version() -> None:
    draws = RandomDraws(3, "a")
    assert [draws.draw_index(10) for _ in range(6)] == [1, 1, 9, 2, 3, 0]
    items = list(range(6))
    draws.shuffle(items)
    assert items == [5, 4, 3, 1, 0, 2]
    counts = [0] * 5
    for _ in range(2000):
        counts[draws.draw_index(5)] += 1
    assert min(counts) > 330 and 0 <= draws.draw_uniform() < 1
