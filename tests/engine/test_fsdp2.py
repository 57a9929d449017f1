"""FSDP2 on packed bytes: spans, bytes on the wire, storage, HSDP; real processes, uneven rows."""

import pytest
import torch
from torch.distributed.tensor import DTensor

from dist_peft.core.config.run import EngineConfig, TrainConfig
from dist_peft.core.world import World
from dist_peft.engine.shard_placement import choose_shard_placement
from dist_peft.train.optimizers import make_optimizer_factory
from tests.support.dist import run_ranks
from tests.support.tiny_engines import (
    CPU,
    Model,
    Outcome,
    assert_same,
    assert_same_bits,
    batch,
    embedding_bytes,
    filled,
    padded_bytes,
    train,
    whole_values,
)


@pytest.mark.dist
@pytest.mark.parametrize(
    ("ranks", "changes", "micro", "recompute"),
    [
        (2, {}, 6, False),
        (3, {}, 4, False),
        (3, {}, 2, True),
        (3, {"reduce_gradients": "step"}, 2, False),
        (3, {"keep_gathered": 2}, 1, True),
        (2, {"shard_base": False}, 3, False),
        (4, {"shard_group": 2}, 1, False),
    ],
    ids=[
        "2",
        "3 uneven",
        "3 accumulating, recomputing",
        "3 accumulating whole gradients",
        "3, two of three blocks kept",
        "unsharded base",
        "HSDP 2x2, accumulating",
    ],
)
def test_equals_single(ranks: int, changes: dict, micro: int, recompute: bool) -> None:
    config = EngineConfig(**changes)
    expected = train(World(), EngineConfig(), micro=12)
    for outcome in run_ranks(train, ranks, config, micro, recompute):
        assert_same(outcome, expected)


def train_both_ways(world: World) -> list[Outcome]:
    configs = (EngineConfig(), EngineConfig(share_decodes=True))
    return [train(world, config, 3, recompute=True) for config in configs]


@pytest.mark.dist
def test_shared_decodes_have_the_same_bits() -> None:
    """Of three NF4 decodes of a block one is saved, but for the first block, whose input needs no
    gradient."""
    for plain, shared in run_ranks(train_both_ways, 2):
        assert_same_bits(shared, plain)
        assert (plain.decodes, shared.decodes) == (3 * 2 * 8, 3 * 2 * 6)


@pytest.mark.dist
def test_bytes_gathered_are_packed_bytes_times_passes() -> None:
    """Blocks travel for forward and for backward; rows of the embedding once, as its backward needs
    no weight; the head and the root (the last norm) stay in between."""
    ranks, micro_steps = 3, 2
    expected = micro_steps * (
        2 * padded_bytes(ranks, "blocks.")
        + padded_bytes(ranks, "head.")
        + padded_bytes(ranks, "last")
    )
    rows = [embedding_bytes(ranks, rank, 2) for rank in range(ranks)]
    for own, outcome in zip(rows, run_ranks(train, ranks, EngineConfig(), 2), strict=True):
        assert outcome.gathered == [expected + each for each in own]
    kept = sum(padded_bytes(ranks, f"blocks.{n}.") for n in (0, 1))
    once = expected - (2 * micro_steps - 1) * kept
    found = run_ranks(train, ranks, EngineConfig(keep_gathered=2), 2)
    for own, outcome in zip(rows, found, strict=True):
        assert outcome.gathered == [once + each for each in own]


def _local_bytes(world: World) -> int:
    model, engine = filled(world, EngineConfig())
    total = 0
    for parameter in model.parameters():
        own = engine.get_local_bytes(parameter)
        if own is None:
            own = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        else:
            assert parameter.untyped_storage().nbytes() == 0
        total += own.numel() * own.element_size()
    return total


@pytest.mark.dist
def test_each_rank_rests_on_its_own_rows() -> None:
    ranks = 3
    for rank, local in enumerate(run_ranks(_local_bytes, ranks)):
        expected = sum(
            choose_shard_placement(p, ranks).count_local_elements(rank) * p.element_size()
            for p in Model().parameters()
        )
        assert local == expected


def _reduced_gradients(world: World, how: str) -> list[int]:
    """Values of reduced gradients after a micro-batch that is not the last, and after the last."""
    model, engine = filled(world, EngineConfig(reduce_gradients=how))
    learning = [p for p in model.parameters() if p.requires_grad]
    found = []
    for last in (False, True):
        engine.backward(model(batch(0)).square().sum(), last=last)
        found.append(sum(p.grad.to_local().numel() for p in learning if p.grad is not None))
    return found


@pytest.mark.dist
@pytest.mark.parametrize("how", ["micro_batch", "step"])
def test_gradients_are_reduced_to_shares_after_each_micro_batch(how: str) -> None:
    share = sum(p.numel() for p in Model().parameters() if p.requires_grad) // 2
    expected = [share if how == "micro_batch" else 0, share]
    assert run_ranks(_reduced_gradients, 2, how) == [expected] * 2


def _refill(world: World) -> bool:
    """Rows replaced between forwards are what the next forward gathers."""
    model, engine = filled(world, EngineConfig())
    with torch.no_grad():
        before = model(batch(0))
        for block in model.blocks:
            rows = engine.local_row_span(block.up.packed)
            engine.fill_local_rows(
                block.up, "packed", whole_values()["blocks.0.up.packed"][rows.slice]
            )
        after = model(batch(0))
    expected = whole_values()["blocks.0.up.packed"]
    gathered = [engine.gather_parameter(block.up.packed) for block in model.blocks]
    return not torch.equal(before, after) and all(torch.equal(g, expected) for g in gathered)


@pytest.mark.dist
def test_rows_can_be_replaced_between_forwards() -> None:
    assert run_ranks(_refill, 3) == [True] * 3


def _evaluate_then_load(world: World) -> bool:
    """The root's parameters, whole after an evaluation, are those of the state loaded since."""
    model, engine = filled(world, EngineConfig())
    model.last.requires_grad_(True)
    engine.setup_optimizer(model, make_optimizer_factory(TrainConfig(), CPU), lambda name: 1.0)
    with torch.no_grad():
        model(batch(0))
        state = {key: value.clone() for key, value in engine.training_state_dict(model).items()}
        state["param/last"] = torch.zeros_like(state["param/last"])
        model(batch(0))
        engine.load_training_state_dict(model, state, 0)
        return not model(batch(0)).any()


@pytest.mark.dist
def test_state_loaded_after_an_evaluation_is_computed_with() -> None:
    assert run_ranks(_evaluate_then_load, 3) == [True] * 3
