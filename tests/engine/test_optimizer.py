"""Clipping, groups, moments and state, against torch's own pieces."""

import copy
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dist_peft.core.config.run import EngineConfig, TrainConfig
from dist_peft.core.trainable_steps import ALWAYS, TrainableSteps
from dist_peft.core.world import World
from dist_peft.engine.engine_protocol import local_parameters
from dist_peft.engine.fsdp2 import Fsdp2Engine
from dist_peft.engine.optimizer import LocalOptimizer
from dist_peft.train.optimizers import make_optimizer_factory
from tests.support.dist import run_ranks

CPU = torch.device("cpu")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)
        self.a = nn.Parameter(torch.randn(5, 3, generator=generator))
        self.b = nn.Parameter(torch.randn(4, generator=generator))

    def give_gradients(self, seed: int, scale: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.a.grad = torch.randn(5, 3, generator=generator) * scale
        self.b.grad = torch.randn(4, generator=generator) * scale

    def gradient_norm(self) -> float:
        assert self.a.grad is not None and self.b.grad is not None
        return float(torch.cat([self.a.grad.flatten(), self.b.grad]).double().norm())


class Factory:
    """SGD whose moments are two tensors it never uses; counts what it was asked."""

    moment_names: tuple[str, ...] = ("exp_avg", "exp_avg_sq")

    def __init__(self, wants_plain: bool = False) -> None:
        self.wants_plain = wants_plain
        self.kept: dict[int, dict[str, Tensor]] = {}
        self.steps: list[int] = []

    def build_optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        for group in groups:
            for p in group["params"]:
                self.kept[id(p)] = {k: torch.zeros_like(p) for k in ("exp_avg", "exp_avg_sq")}
        return torch.optim.SGD(groups, lr=math.nan)  # step() must set the rate

    def read_moments(
        self, optimizer: torch.optim.Optimizer, parameter: Tensor
    ) -> dict[str, Tensor]:
        return self.kept[id(parameter)]

    def write_moments(
        self, optimizer: torch.optim.Optimizer, parameter: Tensor, moments: Mapping[str, Tensor]
    ) -> None:
        self.kept[id(parameter)] = {key: value.clone() for key, value in moments.items()}

    def set_num_steps(
        self, optimizer: torch.optim.Optimizer, step: int, skipped: Collection[int] = ()
    ) -> None:
        self.steps.append(step)


def same(tensor: Tensor) -> Tensor:
    return tensor


def make(
    model: nn.Module,
    factory: Any = None,
    lr_scale: Callable[[str], float] = lambda name: 1.0,
    wrap: Callable[[Tensor, Tensor], Tensor] = lambda t, like: t,
    total: Callable[[Tensor], Tensor] = same,
) -> LocalOptimizer:
    factory = factory or make_optimizer_factory(TrainConfig(), CPU)
    return LocalOptimizer(model, factory, lr_scale, local=same, wrap=wrap, total=total)


class TestClipping:
    @pytest.mark.parametrize("max_norm", [0.5, 1e-3])
    def test_to_max_norm(self, max_norm: float) -> None:
        model = Model()
        before = copy.deepcopy(model)
        optimizer = make(model, Factory())
        model.give_gradients(1)
        norm = model.gradient_norm()
        assert norm > max_norm
        assert optimizer.step(lr=1.0, max_norm=max_norm) == pytest.approx(norm, rel=1e-6)
        change = torch.cat([(before.a - model.a).flatten(), before.b - model.b]).detach()
        assert float(change.norm()) == pytest.approx(max_norm, rel=1e-3 if max_norm < 0.1 else 1e-5)

    @pytest.mark.parametrize("max_norm", [0.0, 1e6])
    def test_not_at_all(self, max_norm: float) -> None:
        model = Model()
        optimizer = make(model, Factory())
        model.give_gradients(1)
        expected = (model.a - model.a.grad).detach()
        optimizer.step(lr=1.0, max_norm=max_norm)
        assert torch.equal(model.a, expected)

    def test_norm_counts_what_the_other_ranks_have(self) -> None:
        model = Model()
        optimizer = make(model, Factory(), total=lambda squares: squares * 4)
        model.give_gradients(1)
        norm = model.gradient_norm()
        assert optimizer.step(lr=1.0, max_norm=0.0) == pytest.approx(2 * norm, rel=1e-6)

    def test_no_gradients_at_all(self) -> None:
        assert make(Model()).step(lr=1.0, max_norm=1.0) == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_gradient_that_is_not_finite_changes_nothing(name: Any, bad: float) -> None:
    model = Model()
    optimizer = make(model, make_optimizer_factory(TrainConfig(optimizer=name), CPU))
    model.give_gradients(1)
    optimizer.step(lr=0.1, max_norm=1.0)
    before = {key: value.clone() for key, value in optimizer.training_state_dict().items()}
    assert before["exp_avg/a"].any()
    model.give_gradients(2)
    model.a.grad[3, 1] = bad
    assert not math.isfinite(optimizer.step(lr=0.1, max_norm=1.0))
    assert model.a.grad is None and model.b.grad is None
    after = optimizer.training_state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_learning_rate_is_scaled_by_group() -> None:
    model = Model()
    before = copy.deepcopy(model)
    optimizer = make(model, Factory(), lr_scale=lambda name: 16.0 if name == "b" else 1.0)
    model.give_gradients(1)
    gradients = model.a.grad.clone(), model.b.grad.clone()
    optimizer.step(lr=0.25, max_norm=0.0)
    assert len(optimizer.optimizer.param_groups) == 2
    assert torch.equal(model.a, before.a - 0.25 * gradients[0])
    assert torch.equal(model.b, before.b - 4.0 * gradients[1])


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_state_goes_on_where_it_was(name: Any) -> None:
    """Two steps, a copy of the state, two more: a new optimizer given the copy does the same."""

    def run(model: Model, optimizer: LocalOptimizer, seeds: range) -> None:
        for seed in seeds:
            model.give_gradients(seed)
            optimizer.step(lr=0.1, max_norm=1.0)

    def fresh() -> tuple[Model, LocalOptimizer]:
        model = Model()
        return model, make(model, make_optimizer_factory(TrainConfig(optimizer=name), CPU))

    model, optimizer = fresh()
    run(model, optimizer, range(2))
    saved = {key: value.clone() for key, value in optimizer.training_state_dict().items()}
    assert saved.keys() == {f"{k}/{n}" for k in ("param", "exp_avg", "exp_avg_sq") for n in "ab"}
    run(model, optimizer, range(2, 4))
    other, resumed = fresh()
    resumed.load_training_state_dict(saved, step=2)
    run(other, resumed, range(2, 4))
    assert torch.equal(other.a, model.a) and torch.equal(other.b, model.b)


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_what_learns_late_is_left_alone_and_resumes_there(name: Any) -> None:
    """``b`` has gradients from step 2 on; stopped after step 3, all goes on as without a stop."""
    factory = make_optimizer_factory(TrainConfig(optimizer=name, weight_decay=0.1), CPU)

    def fresh() -> tuple[Model, LocalOptimizer]:
        model = Model()
        steps = {"a": ALWAYS, "b": TrainableSteps(((2, None),))}.__getitem__
        optimizer = LocalOptimizer(
            model,
            factory,
            lambda name: 1.0,
            local=same,
            wrap=lambda t, like: t,
            total=same,
            trainable_steps=steps,
        )
        return model, optimizer

    def run(model: Model, optimizer: LocalOptimizer, steps: range) -> None:
        for step in steps:
            model.give_gradients(step)
            model.b.grad = model.b.grad if step >= 2 else None
            optimizer.step(lr=0.1, max_norm=1.0)

    model, optimizer = fresh()
    run(model, optimizer, range(2))
    assert torch.equal(model.b, Model().b) and not torch.equal(model.a, Model().a)
    assert not optimizer.training_state_dict()["exp_avg_sq/b"].any()
    run(model, optimizer, range(2, 3))
    saved = {key: value.clone() for key, value in optimizer.training_state_dict().items()}
    run(model, optimizer, range(3, 5))
    other, resumed = fresh()
    resumed.load_training_state_dict(saved, step=3)
    run(other, resumed, range(3, 5))
    assert torch.equal(other.a, model.a) and torch.equal(other.b, model.b)


def test_plain_factory_updates_the_models_memory_and_wraps_its_moments() -> None:
    model, factory = Model(), Factory(wants_plain=True)
    wrapped: list[tuple[Tensor, Tensor]] = []

    def wrap(plain: Tensor, like: Tensor) -> Tensor:
        wrapped.append((plain, like))
        return plain + 7

    optimizer = make(model, factory, wrap=wrap)
    model.give_gradients(1)
    expected = (model.a - model.a.grad).detach()
    optimizer.step(lr=1.0, max_norm=0.0)
    assert optimizer.updated["a"] is not model.a
    assert torch.equal(model.a, expected)
    assert optimizer.updated["a"].grad is None
    state = optimizer.training_state_dict()
    assert [like for _, like in wrapped] == [model.a, model.a, model.b, model.b]
    assert torch.equal(state["exp_avg/a"], torch.full((5, 3), 7.0))
    optimizer.load_training_state_dict(state, step=5)
    assert factory.steps == [5]
    assert torch.equal(
        factory.kept[id(optimizer.updated["b"])]["exp_avg_sq"], torch.full((4,), 7.0)
    )


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_without_moments_it_starts_afresh(name: Any) -> None:
    """After other steps, parameters given back alone: as an optimizer that never made a step."""

    def two_steps(optimizer: LocalOptimizer, model: Model, seed: int) -> dict[str, Tensor]:
        for step in range(2):
            model.give_gradients(seed + step)
            optimizer.step(lr=0.1, max_norm=1.0)
        return {key: value.clone() for key, value in optimizer.training_state_dict().items()}

    model = Model()
    optimizer = make(model, make_optimizer_factory(TrainConfig(optimizer=name), CPU))
    start = local_parameters(optimizer.training_state_dict())
    assert sorted(start) == ["param/a", "param/b"]
    first = two_steps(optimizer, model, 7)
    two_steps(optimizer, model, 9)
    optimizer.load_training_state_dict(start, step=0)
    again = two_steps(optimizer, model, 7)
    assert all(torch.equal(again[key], first[key]) for key in first)


class Shardable(Model):
    def get_input_embeddings(self) -> nn.Module:
        return nn.Identity()

    get_output_embeddings = get_input_embeddings


def _load_other_values(world: World) -> None:
    for name in ("adamw", "adamw8bit"):
        model = Shardable()
        engine = Fsdp2Engine(EngineConfig(), world, CPU)
        engine.shard_model(model, [])
        factory = make_optimizer_factory(TrainConfig.model_validate({"optimizer": name}), CPU)
        engine.setup_optimizer(model, factory, lambda parameter: 1.0)
        wanted = {
            key: value.clone() + 0.5 for key, value in engine.training_state_dict(model).items()
        }
        assert all(isinstance(value, DTensor) for value in wanted.values())
        engine.load_training_state_dict(model, wanted, step=3)
        for key, value in engine.training_state_dict(model).items():
            assert torch.equal(
                engine.gather_parameter(value), engine.gather_parameter(wanted[key])
            ), key
        engine.load_training_state_dict(model, local_parameters(wanted), step=0)
        for key, value in engine.training_state_dict(model).items():
            expected = engine.gather_parameter(wanted[key]) * key.startswith("param/")
            assert torch.equal(engine.gather_parameter(value), expected), key


@pytest.mark.dist
def test_state_of_shards_is_taken_over() -> None:
    run_ranks(_load_other_values, 2)
