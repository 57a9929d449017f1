"""Which rows steps take: pools and mixtures."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_peft.core.config.run import DataConfig
from dist_peft.core.errors import UserError
from dist_peft.data import order as order_module
from dist_peft.data.order import MixtureOrder, MixtureShare, PoolOrder, make_mixture_shares


def pool(seed: int, size: int, epoch: int, shuffle: bool = True) -> list[int]:
    return PoolOrder(size, seed, shuffle).list_rows(epoch * size, size)


def test_pool_depends_on_seed_epoch_and_size_only() -> None:
    assert pool(0, 10, 0) == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]
    orders = [pool(seed, 50, epoch) for seed in range(3) for epoch in range(3)]
    assert len({tuple(order) for order in orders}) == 9
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert pool(5, 4, 3, shuffle=False) == [0, 1, 2, 3]


def test_pool_is_fair() -> None:
    """Each row comes first about equally often."""
    first = np.bincount([pool(7, 5, epoch)[0] for epoch in range(1000)], minlength=5)
    assert first.min() > 150


SHARES = [MixtureShare(0, 5, 1.0), MixtureShare(5, 3, 3.0)]


def mixed(shares: list[MixtureShare] = SHARES, **changes: Any) -> MixtureOrder:
    return MixtureOrder(shares, **{"global_batch": 4, "seed": 1, "shuffle": True, **changes})


def test_shares_are_those_asked_for() -> None:
    rows = np.array(mixed().list_rows(0, 20_000))
    assert np.mean(rows < 5) == pytest.approx(0.25, abs=0.01)


def test_each_source_serves_whole_epochs() -> None:
    rows = mixed().list_rows(0, 400)
    for share in SHARES:
        own = [r - share.start for r in rows if share.start <= r < share.start + share.size]
        for begin in range(0, len(own) - share.size, share.size):
            assert sorted(own[begin : begin + share.size]) == list(range(share.size))


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_stretch_is_that_of_the_whole(data: st.DataObject) -> None:
    """Resuming is asking for places in the middle, also across blocks of draws."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order_module, "_BLOCK", 16)
        whole = mixed().list_rows(0, 200)
        first = data.draw(st.integers(0, 199))
        count = data.draw(st.integers(1, 200 - first))
        assert mixed().list_rows(first, count) == whole[first : first + count]


def test_seeds_differ() -> None:
    assert mixed(seed=1).list_rows(0, 100) != mixed(seed=2).list_rows(0, 100)


def test_curriculum() -> None:
    """a alone, then both, then b alone; steps of 4 places."""
    order = mixed([MixtureShare(0, 5, 1.0, 0, 20), MixtureShare(5, 3, 1.0, 10, None)])
    steps = [order.list_rows(4 * step, 4) for step in range(40)]
    assert all(row < 5 for rows in steps[:10] for row in rows)
    middle = [row for rows in steps[10:20] for row in rows]
    assert min(middle) < 5 <= max(middle)
    assert all(row >= 5 for rows in steps[20:] for row in rows)
    order.check_steps(1000)


def test_a_step_without_a_source_is_refused() -> None:
    order = mixed([MixtureShare(0, 5, 1.0, 0, 20), MixtureShare(5, 3, 1.0, 25, None)])
    order.check_steps(20)
    with pytest.raises(UserError, match=r"no source of data\.train is active at step 20"):
        order.check_steps(21)


def config(**changes: Any) -> DataConfig:
    sources = [{"path": "a.jsonl", "weight": 3.0}, {"path": "b.jsonl"}]
    return DataConfig.model_validate({"train": sources, **changes})


def test_shares_by_weight_and_by_size() -> None:
    assert make_mixture_shares(config(mixing="weights"), [10, 40]) == [
        MixtureShare(0, 10, 3.0),
        MixtureShare(10, 40, 1.0),
    ]
    plain = [{"path": "a.jsonl"}, {"path": "b.jsonl"}]
    by_size = make_mixture_shares(config(train=plain, mixing="sizes"), [10, 40])
    assert [share.weight for share in by_size] == [0.25, 1.0]
    tempered = make_mixture_shares(config(train=plain, mixing="sizes", temperature=2.0), [10, 40])
    assert [share.weight for share in tempered] == [0.5, 1.0]


def test_an_epoch_has_one_variant_of_each_record() -> None:
    """Three epochs of 4, 5 and 4 sequences, again and again, each in an order of its own."""
    epochs = [[(0, 4)], [(4, 6), (6, 9)], [(9, 13)]]
    order = PoolOrder(13, 3, True, epochs)
    rows = order.list_rows(0, 26)
    parts = [rows[a:b] for a, b in ((0, 4), (4, 9), (9, 13), (13, 17), (17, 22), (22, 26))]
    for number, part in enumerate(parts):
        assert sorted(part) == [i for first, stop in epochs[number % 3] for i in range(first, stop)]
    assert parts[0] != parts[3] and parts[1] != parts[4]
    assert order.list_rows(7, 12) == rows[7:19]
    assert PoolOrder(13, 3, False, epochs).list_rows(2, 4) == [2, 3, 4, 5]


def test_mixture_of_a_source_with_variants() -> None:
    config = DataConfig.model_validate({"train": ["a", "b"], "mixing": "sizes"})
    epochs = [[[(0, 4)], [(4, 8)]], [[(8, 12)]]]
    shares = make_mixture_shares(config, [8, 4], epochs)
    assert [share.weight for share in shares] == [1, 1]  # of an epoch, not of all variants
    rows = mixed(shares).list_rows(0, 200)
    own = [row for row in rows if row < 8]
    assert [sorted(own[i : i + 4]) for i in (0, 4, 8)] == [[0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 2, 3]]
    assert {row for row in rows if row >= 8} == {8, 9, 10, 11}
