"""Importances of an optimizer with plain tensors, one with 8-bit moments, and after a resume."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_peft.adapters.step_hooks import ImportanceRule
from dist_peft.core.config.run import TrainConfig
from dist_peft.engine.single import SingleEngine
from dist_peft.train.importance import EngineParameters, ImportanceFactory
from dist_peft.train.optimizers import make_optimizer_factory

CPU = torch.device("cpu")


def made(optimizer: Any, active: list[bool]) -> tuple[nn.Module, SingleEngine]:
    torch.manual_seed(0)
    model, engine = nn.Linear(5, 3), SingleEngine(CPU)
    rule = ImportanceRule(0.8, 0.7, lambda: active[0])
    train = TrainConfig(optimizer=optimizer)
    factory = ImportanceFactory(make_optimizer_factory(train, CPU), rule)
    engine.setup_optimizer(model, factory, lambda name: 1.0)
    return model, engine


def step(model: nn.Module, engine: SingleEngine, number: int) -> Tensor:
    """One step; returns the gradient of the weight."""
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(number))
    engine.backward(model(x).square().sum(), last=True)
    assert isinstance(model.weight, Tensor) and model.weight.grad is not None
    gradient = model.weight.grad.clone()
    engine.step(1e-2, 0.0)
    return gradient


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_equal_to_the_formula_and_after_a_resume(optimizer: str) -> None:
    if optimizer != "adamw":
        pytest.importorskip("bitsandbytes")
    active = [True]
    model, engine = made(optimizer, active)
    sensitivity = uncertainty = torch.zeros(3, 5)
    for number in range(4):
        active[0] = number != 2
        gradient = step(model, engine, number)
        if active[0]:
            importance = (model.get_parameter("weight").detach() * gradient).abs()
            sensitivity = 0.8 * sensitivity + (1 - 0.8) * importance
            uncertainty = 0.7 * uncertainty + (1 - 0.7) * (importance - sensitivity).abs()
        if number == 1:
            kept = {k: v.clone() for k, v in engine.training_state_dict(model).items()}
            model, engine = made(optimizer, active)
            engine.load_training_state_dict(model, kept, 2)
    access = EngineParameters(model, engine)
    assert torch.equal(access.gather_moment("weight", "sensitivity"), sensitivity)
    assert torch.equal(access.gather_moment("weight", "uncertainty"), uncertainty)


def test_parameters_are_replaced() -> None:
    model, engine = made("adamw", [True])
    access = EngineParameters(model, engine)
    access.overwrite_parameter("bias", torch.tensor([1.0, 0.0, 3.0]))
    assert access.gather_parameter("bias").tolist() == [1.0, 0.0, 3.0]
