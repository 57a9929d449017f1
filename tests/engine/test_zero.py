"""DeepSpeed ZeRO over the project's own shards: real processes, every stage, uneven rows."""

import math
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_peft.core.config.run import EngineConfig, TrainConfig
from dist_peft.core.errors import UserError
from dist_peft.core.span import row_span
from dist_peft.core.world import World
from dist_peft.engine import make_engine
from dist_peft.engine.engine_protocol import local_parameters
from dist_peft.engine.zero import ZeroEngine
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

pytest.importorskip("deepspeed", reason="deepspeed is not installed")
pytestmark = pytest.mark.dist

OFFLOAD = {"stage": 2, "cpu_offload": "optimizer"}
OFFLOAD3 = {"stage": 3, "cpu_offload": "optimizer"}
CASES: dict[str, tuple[dict[str, Any], int, bool]] = {
    "stage 1": ({"stage": 1}, 6, False),
    "stage 2, accumulating": ({"stage": 2}, 2, False),
    "stage 1, accumulating, recomputing": ({"stage": 1}, 2, True),
    "unsharded base": ({"stage": 2, "shard_base": False}, 3, False),
    "offload": (OFFLOAD, 2, False),
    "stage 3": ({"stage": 3}, 6, False),
    "stage 3, accumulating, recomputing": ({"stage": 3}, 2, True),
    "stage 3, decodes shared": ({"stage": 3, "share_decodes": True}, 2, True),
    "stage 3, offload": (OFFLOAD3, 2, False),
}
RANKS = (2, 3)


def zero(**changes: Any) -> EngineConfig:
    return EngineConfig(kind="zero", **changes)


def every_case(world: World) -> dict[str, Outcome]:
    """All in one set of processes: importing deepspeed takes longer than a case. Stage 3 comes
    last, since it replaces ``torch.nn.functional.linear`` in its process for good."""
    return {
        case: train(world, zero(**changes), micro, recompute)
        for case, (changes, micro, recompute) in CASES.items()
    }


@pytest.fixture(scope="module")
def outcomes() -> dict[int, list[dict[str, Outcome]]]:
    return {ranks: run_ranks(every_case, ranks) for ranks in RANKS}


@pytest.fixture(scope="module")
def expected() -> Outcome:
    return train(World(), EngineConfig(), micro=12)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("case", CASES)
def test_equals_single(
    outcomes: dict[int, list[dict[str, Outcome]]], expected: Outcome, ranks: int, case: str
) -> None:
    for outcome in outcomes[ranks]:
        assert_same(outcome[case], expected)


@pytest.mark.parametrize("ranks", RANKS)
def test_shared_decodes_have_the_same_bits(
    outcomes: dict[int, list[dict[str, Outcome]]], ranks: int
) -> None:
    for outcome in outcomes[ranks]:
        plain = outcome["stage 3, accumulating, recomputing"]
        shared = outcome["stage 3, decodes shared"]
        assert_same_bits(shared, plain)
        micro_steps = 3 * 12 // ranks // 2
        assert (plain.decodes, shared.decodes) == (micro_steps * 8, micro_steps * 6)


@pytest.mark.parametrize("ranks", RANKS)
def test_bytes_gathered_are_packed_bytes_times_passes(
    outcomes: dict[int, list[dict[str, Outcome]]], ranks: int
) -> None:
    """The base travels as under FSDP2; in stages 1 and 2 adapters do once, after the update."""
    base = (
        2 * padded_bytes(ranks, "blocks.", learns=False, align=16)
        + padded_bytes(ranks, "head.", align=16)
        + padded_bytes(ranks, "last", align=16)
    )
    exact = sum(p.numel() * 4 for p in Model().parameters() if p.requires_grad)
    adapters = -(-exact // (8 * ranks)) * 8 * ranks  # shares of an even number of values
    for rank, outcome in enumerate(outcomes[ranks]):
        rows, rows_of_two = (embedding_bytes(ranks, rank, micro) for micro in (12 // ranks, 2))
        assert outcome["stage 1"].gathered == [base + adapters + own for own in rows]
        fixed = 12 // ranks // 2 * base + adapters
        assert outcome["stage 2, accumulating"].gathered == [fixed + own for own in rows_of_two]
        assert outcome["unsharded base"].gathered == [adapters] * 3
        # DeepSpeed keeps what it gathered for as long as its limits (engine.deepspeed_config) allow
        for gathered, own in zip(outcome["stage 3"].gathered, rows, strict=True):
            assert base + exact <= gathered - own <= base + 2 * exact + 256


def hsdp(world: World) -> Outcome:
    return train(world, zero(stage=2, shard_group=2), 3)


def test_hsdp_equals_single(expected: Outcome) -> None:
    for outcome in run_ranks(hsdp, 4):
        assert_same(outcome, expected)


# -- state -------------------------------------------------------------------------------------


def adam(world: World, config: EngineConfig, state: dict[str, Tensor] | None, steps: int) -> Any:
    """Go on from ``state`` for ``steps`` steps of Adam; losses and the state after."""
    model, engine = filled(world, config)
    names = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}
    factory = make_optimizer_factory(TrainConfig(), CPU)
    call = engine.setup_optimizer(model, factory, lambda name: 2.0 if ".1." in name else 1.0)
    first = 0
    if state is not None:
        first = int(state["steps"])
        engine.training_state_dict(model)  # as a resume does: the template of what is loaded
        engine.load_training_state_dict(model, state, first)
        with torch.no_grad():
            call(batch(0))  # an evaluation in between changes nothing
    losses = []
    for step in range(first, first + steps):
        loss = call(batch(step)[world.rank :: world.size]).square().sum() / batch(step).numel()
        losses.append(world.sum_over_ranks(loss.item())[0])
        engine.backward(loss, last=True)
        engine.step(lr=0.01, max_norm=0.1)
    after = {
        key: (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().cpu()
        for key, value in engine.training_state_dict(model).items()
    }
    if isinstance(engine, ZeroEngine):
        for key, shard in engine.training_state_shards(model).items():
            end = shard.start + shard.values.numel()
            assert shard.shape == after[key].shape
            assert torch.equal(shard.values, after[key].flatten()[shard.start : end]), key
            assert world.sum_over_ranks(shard.values.numel()) == [after[key].numel()], key
    for name, shape in names.items():
        for key in ("param", "exp_avg", "exp_avg_sq"):
            assert after[f"{key}/{name}"].shape == shape
    return losses, after | {"steps": torch.tensor(first + steps)}


STAGES_BY_TURN = [pytest.param(s, marks=pytest.mark.turn(s - 1, 3)) for s in (1, 2, 3)]


@pytest.mark.parametrize("stage", STAGES_BY_TURN)
def test_state_goes_on_at_another_world_size_and_in_another_engine(stage: int) -> None:
    """single -> zero on 3 ranks -> single; single learns from no one but its own state."""
    whole, _ = adam(World(), EngineConfig(), None, 6)
    _, state = adam(World(), EngineConfig(), None, 2)
    losses, state = run_ranks(adam, 3, zero(stage=stage), state, 2)[0]
    torch.testing.assert_close(losses, whole[2:4], rtol=1e-6, atol=0)
    losses, _ = adam(World(), EngineConfig(), state, 2)
    torch.testing.assert_close(losses, whole[4:6], rtol=1e-6, atol=0)


def fresh_state(world: World, stage: int) -> None:
    model, engine = filled(world, zero(stage=stage))
    call = engine.setup_optimizer(
        model, make_optimizer_factory(TrainConfig(), CPU), lambda name: 1.0
    )

    def check() -> dict[str, Tensor]:
        state, values = engine.training_state_dict(model), whole_values()
        assert state
        for key, value in state.items():
            kind, _, name = key.partition("/")
            assert torch.equal(value, values[name] if kind == "param" else torch.zeros_like(value))
        return local_parameters(state)

    def steps() -> list[float]:
        losses = []
        for step in range(3):
            loss = call(batch(step)).square().mean() / world.size
            losses.append(loss.item())
            engine.backward(loss, last=True)
            engine.step(lr=0.01, max_norm=0.1)
        return losses

    start = check()
    first = steps()
    engine.load_training_state_dict(model, start, 0)
    check()
    assert steps() == first  # nothing of the steps before is left


@pytest.mark.parametrize("stage", STAGES_BY_TURN)
def test_state_before_the_first_step_can_be_given_back(stage: int) -> None:
    run_ranks(fresh_state, 2, stage)


def not_finite(world: World, stage: int) -> None:
    model, engine = filled(world, zero(stage=stage))
    call = engine.setup_optimizer(
        model, make_optimizer_factory(TrainConfig(), CPU), lambda name: 1.0
    )
    before = {key: value.clone() for key, value in engine.training_state_dict(model).items()}
    bad = float("nan") if world.rank == 1 else 1.0
    engine.backward(call(batch(0)).square().sum() * bad, last=True)
    assert not math.isfinite(engine.step(lr=0.1, max_norm=1.0))
    for key, value in engine.training_state_dict(model).items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("stage", [2, 3])
def test_a_step_that_is_not_finite_changes_nothing(stage: int) -> None:
    run_ranks(not_finite, 2, stage)


def no_empty_adapter(world: World) -> None:
    """Under stage 3 the parameter itself is empty between uses; what is gathered never is."""
    model, engine = filled(world, zero(stage=3))
    assert isinstance(engine, ZeroEngine)
    engine.setup_optimizer(model, make_optimizer_factory(TrainConfig(), CPU), lambda name: 1.0)
    parameter = model.blocks[0].change
    assert parameter.numel() == 0
    name = "blocks.0.change"
    assert torch.equal(engine.gather_parameter(parameter), whole_values()[name])
    for wrong in (parameter.detach(), None, torch.zeros(3, 3)):
        with pytest.raises(AssertionError, match="gathered"):
            engine._check_gathered_shape(wrong, parameter)


def test_gather_cannot_give_an_empty_tensor() -> None:
    run_ranks(no_empty_adapter, 2)


def rests(world: World) -> tuple[int, int]:
    """Bytes of the base that this rank holds, whole storages included; and its share."""
    model, engine = filled(world, zero(stage=3))
    assert isinstance(engine, ZeroEngine)
    frozen = {n: p for n, p in model.named_parameters() if not p.requires_grad}
    call = engine.setup_optimizer(
        model, make_optimizer_factory(TrainConfig(), CPU), lambda name: 1.0
    )
    assert all(p.requires_grad for p in model.parameters()), "DeepSpeed sees adapters only"
    engine.backward(call(batch(0)).square().sum(), last=True)
    storages = sum(p.untyped_storage().nbytes() for p in frozen.values())
    local = sum(unit.local.numel() for unit in engine.shards._units)
    share = sum(
        len(row_span(p.shape[0], world.size, world.rank)) * p.shape[1:].numel() * p.element_size()
        for p in frozen.values()
    )
    return storages + local, share


def test_each_rank_rests_on_its_own_rows() -> None:
    for rank, (held, share) in enumerate(run_ranks(rests, 3)):
        padding = 20 * (256 + 16)  # at most a row and an alignment for each of 20 tensors
        assert share <= held <= share + padding, rank


# -- refusals ----------------------------------------------------------------------------------


def test_params_offload_is_fsdp2s() -> None:
    with pytest.raises(UserError, match="cpu_offload: params is fsdp2's"):
        ZeroEngine(zero(cpu_offload="params"), TrainConfig(), World(), CPU)


def test_other_optimizers_are_refused() -> None:
    with pytest.raises(UserError, match="adamw8bit keeps state that DeepSpeed cannot shard"):
        ZeroEngine(zero(), TrainConfig(optimizer="adamw8bit"), World(), CPU)


def test_deepspeed_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(UserError, match=r"pip install 'dist_peft\[deepspeed\]'"):
        ZeroEngine(zero(), TrainConfig(), World(), CPU)


def test_one_process_is_refused() -> None:
    with pytest.raises(UserError, match=r"engine\.kind is zero but there is one process"):
        make_engine(zero(), TrainConfig(), World(), CPU)
